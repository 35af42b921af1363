"""Turning a module tree of our own into one that runs fast: our attention, linears of few rows, fused norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import attention, flash
from .kernels import _native
from .kernels.rms_norm import rms_norm
from .kernels.small_linear import SmallLinear


@torch.inference_mode()
def as_runner(model: Any) -> Any:
    """Change a tree, whose config and modules no other model shares, and return it."""
    wants_flash = model.config._attn_implementation == "flash_attention_2"
    model.config._attn_implementation = (flash if wants_flash else attention).IMPLEMENTATION
    if _native.core is not None:
        for module in model.modules():
            if "forward" not in vars(module) and (fast := _fast(module)) is not None:
                module.forward = fast
    return model


def _fast(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What gives a module's results sooner, where the C++ core has it."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_cpu:
        return None
    if type(module) is nn.Linear and weight.dtype == torch.bfloat16:  # at no number of rows slower than PyTorch
        return SmallLinear(weight, module.bias)
    if type(module).__name__.endswith("RMSNorm") and weight.dim() == 1:
        return _fast_norm(module, weight.detach())
    return None


def _fast_norm(module: nn.Module, weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """`rms_norm` in place of a norm that it equals bit for bit: names of classes do not say where they round."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float):
        return None
    x = torch.linspace(-3, 5, 2 * weight.numel(), device=weight.device).view(2, -1).to(weight.dtype)
    for offset in (0.0, 1.0):
        if torch.equal(module(x), rms_norm(x, weight, eps, offset=offset)):
            return lambda x: rms_norm(x, weight, eps, offset=offset)
    return None
