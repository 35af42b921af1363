"""silu_mul in C++ on the CPU (kernels/csrc/silu_mul)."""

from __future__ import annotations

from torch import Tensor

from .. import _native


def run(gate: Tensor, up: Tensor) -> Tensor | None:
    """Return the result for contiguous float32 or bfloat16 tensors of one shape on the CPU; None for other tensors."""
    return _native.core.silu_mul(gate, up)
