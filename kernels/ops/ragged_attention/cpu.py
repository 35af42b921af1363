"""ragged_attention and ragged_append in C++ on the CPU (kernels/csrc/ragged_attention)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _native


def attention(*arguments: Any) -> Tensor | None:
    """Return the result for float32 or bfloat16 tensors on the CPU, contiguous in their last dimension.

    None for other tensors. `arrivals`, the last argument, is not used here: only kernels of a GPU need it.

    Raises ValueError for slots or positions that the cache does not have.
    """
    return _native.core.ragged_attention(*arguments[:9])


def converted_attention(*arguments: Any) -> tuple[Any, ...] | None:
    """Return the arguments in the form that `attention` takes; None for other devices."""
    tensors, options = arguments[:5], arguments[5:]
    return (*map(_native.plain, tensors), *options) if all(tensor.is_cpu for tensor in tensors) else None


def append(*tensors: Tensor) -> bool | None:
    """Write to the caches and return True; None for caches or new entries that the core does not take.

    Raises ValueError for slots or positions that the cache does not have, before anything is written.
    """
    return _native.core.ragged_append(*tensors)


def converted_append(keys: Tensor, values: Tensor, *new: Tensor) -> tuple[Tensor, ...] | None:
    """Return the arguments in the form that `append` takes; None for other devices.

    The caches are never converted, because the op writes to them.
    """
    return (keys, values, *map(_native.plain, new)) if all(tensor.is_cpu for tensor in new) else None
