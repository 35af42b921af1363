"""rms_norm in C++ on the CPU (kernels/csrc/rms_norm)."""

from __future__ import annotations

from torch import Tensor

from .. import _native


def run(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor | None:
    """Return the result for contiguous float32 or bfloat16 tensors of one dtype on the CPU; None for other tensors."""
    return _native.core.rms_norm(x, weight, eps, offset)


def convert(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, float, float] | None:
    """Return the arguments in the form that `run` takes; None for other devices."""
    if not (x.is_cpu and weight.is_cpu):
        return None
    return _native.plain(x).contiguous(), _native.plain(weight), eps, offset
