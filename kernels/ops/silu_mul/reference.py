"""The middle of Llama's gated MLP, silu(gate) · up, with silu(x) = x / (1 + exp(-x))."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The specification of `silu_mul`."""
    return functional.silu(gate) * up
