"""Builds tiny models that run on the fast path."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import build_model

from genarm_fast.models.fast_modules import make_fast
from genarm_fast.models.weights import share_weights


def runner_of(family: str, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Any:
    """Return a model of random weights, whose modules have the fast forwards."""
    return make_fast(share_weights(build_model(family, 0, **config).to(dtype)))
