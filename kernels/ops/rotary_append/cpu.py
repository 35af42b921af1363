"""rotary_append in C++ on the CPU (kernels/csrc/rotary_append)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _native


def run(*arguments: Any) -> Tensor | None:
    """Return the queries for float32 or bfloat16 tensors of one dtype on the CPU, contiguous in their last dimension.

    None for other tensors, and for bias or lanes. Raises ValueError for slots or positions that the cache does not
    have, before anything is written.
    """
    return _native.core.rotary_append(*arguments)


def convert(y: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Any, ...] | None:
    """Return the arguments in the form that `run` takes; None for other devices.

    The caches are never converted, because the op writes to them.
    """
    slots, positions, *norms, eps, bias, b, index = rest
    if not all(tensor.is_cpu for tensor in (y, cos, sin, slots, positions)):
        return None
    plain = (None if tensor is None else _native.plain(tensor).contiguous() for tensor in norms)
    tensors = (*map(_native.plain, (y, cos, sin)), keys, values, *map(_native.plain, (slots, positions)))
    return (*tensors, *plain, eps, bias, b, index)
