"""add_rms_norm in C++ on the CPU (kernels/csrc/rms_norm)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _native


def run(*arguments: Any) -> tuple[Tensor, Tensor] | None:
    """Return the result for contiguous float32 or bfloat16 tensors of one dtype on the CPU.

    None for other tensors, and for lanes.
    """
    return _native.core.add_rms_norm(*arguments)


def convert(
    hidden: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float, *lanes: Tensor | None
) -> tuple[Any, ...] | None:
    """Return the arguments in the form that `run` takes; None for other devices."""
    tensors = (hidden, y, weight)
    if not all(tensor.is_cpu for tensor in tensors):
        return None
    return (*(_native.plain(tensor).contiguous() for tensor in tensors), eps, offset, *lanes)
