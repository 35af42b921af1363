"""silu(gate) · up, the middle of Llama's gated MLP, in one pass: silu(x) = x / (1 + exp(-x))."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The specification of `silu_mul`."""
    return functional.silu(gate) * up
