"""rotary in C++ on the CPU (kernels/csrc/rotary)."""

from __future__ import annotations

from torch import Tensor

from .. import _native


def run(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor] | None:
    """Return the result for float32 or bfloat16 tensors of one dtype on the CPU, contiguous in D; None for others."""
    return _native.core.rotary(query, key, cos, sin) if unsqueeze_dim == 1 else None
