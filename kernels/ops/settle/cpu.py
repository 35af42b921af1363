"""settle in C++ on the CPU (kernels/csrc/settle)."""

from __future__ import annotations

from torch import Tensor

from .. import _native
from .reference import Settled


def run(*arguments: Tensor | None) -> Settled | None:
    """Return the result for int64 and bool tensors on the CPU, with any strides; None for other tensors."""
    fields = _native.core.settle(*arguments)
    return None if fields is None else tuple.__new__(Settled, fields)  # takes half of the time of _make
