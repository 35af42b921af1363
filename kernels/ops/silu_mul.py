"""silu(gate) · up, the middle of Llama's gated MLP, in one pass: silu(x) = x / (1 + exp(-x))."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from . import _native


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The specification of `silu_mul`."""
    return functional.silu(gate) * up


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up of tensors of one shape, silu rounded to their dtype first.

    In C++ on the CPU for contiguous float32 or bfloat16 tensors that need no gradient, within 4e-6 of
    PyTorch's silu (1e-36 absolute where gate < -87); otherwise, and where torch.compile traces it (to
    fuse it with its neighbours), `silu_mul_reference`.
    """
    needs_gradient = (gate.requires_grad or up.requires_grad) and torch.is_grad_enabled()
    if _native.core is not None and not (torch.compiler.is_compiling() or needs_gradient):
        out = _native.core.silu_mul(gate, up)
        if out is not None:
            return out
    return silu_mul_reference(gate, up)
