"""Turning a module tree of our own into one that runs fast: attention over our cache, linears of few rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .attention import IMPLEMENTATION
from .kernels import _native
from .kernels.small_linear import SmallLinear


def as_runner(model: Any) -> Any:
    """Change a tree, whose config and modules no other model shares, and return it."""
    model.config._attn_implementation = IMPLEMENTATION
    for module in model.modules():
        if type(module) is nn.Linear and streams(module.weight) and "forward" not in vars(module):
            module.forward = SmallLinear(module.weight, module.bias)  # type: ignore[method-assign]
    return model


def streams(weight: torch.Tensor) -> bool:
    """Whether the C++ core serves it. It never was slower than PyTorch, and its rows do not depend on each other."""
    return _native.core is not None and weight.is_cpu and weight.dtype == torch.bfloat16
