"""Tiny models as runners."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import build_model

from genarm_fast.models.fast_modules import as_runner
from genarm_fast.models.weights import share_weights


def runner_of(family: str, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Any:
    """A model of random weights, with what runs it fast in place of its modules' forwards."""
    return as_runner(share_weights(build_model(family, 0, **config).to(dtype)))
