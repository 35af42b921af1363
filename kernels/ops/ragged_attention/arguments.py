"""The checks of the arguments of ragged_attention and ragged_append."""

from __future__ import annotations

import torch
from torch import Tensor


def check_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    limit: int | None = None,
    arrivals: Tensor | None = None,
) -> None:
    """Check the arguments of ragged_attention. Raises TypeError or ValueError that names the argument."""
    if query.ndim != 4:
        raise ValueError(f"query of shape {tuple(query.shape)}: expected [N, Hq, q, D]")
    rows, heads, block, width = query.shape
    check_cache(keys, values, slots, positions, rows, block)
    if keys.shape[3] != width:
        raise ValueError(f"keys of shape {tuple(keys.shape)}: expected a width of {width}, as query has")
    if not keys.shape[1] or heads % keys.shape[1]:
        raise ValueError(f"{heads} query heads: expected a multiple of the {keys.shape[1]} heads of keys")
    if not query.dtype == keys.dtype == values.dtype:
        raise TypeError(f"query of {query.dtype}, keys of {keys.dtype}, values of {values.dtype}: expected the same")
    _check_numbers(keys.shape[2], scale, window, softcap, limit)
    if arrivals is not None:
        if arrivals.dtype != torch.int32:
            raise TypeError(f"arrivals of dtype {arrivals.dtype}: expected int32")
        if arrivals.ndim != 1 or not arrivals.is_contiguous() or arrivals.device != query.device:
            raise ValueError(
                f"arrivals of shape {tuple(arrivals.shape)} on {arrivals.device}: expected one contiguous dimension, "
                f"on {query.device}"
            )


def check_append(
    keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, slots: Tensor, positions: Tensor
) -> None:
    """Check the arguments of ragged_append. Raises TypeError or ValueError that names the argument."""
    if new_keys.ndim != 4:
        raise ValueError(f"new_keys of shape {tuple(new_keys.shape)}: expected [N, Hkv, q, D]")
    rows, _, block, _ = new_keys.shape
    check_cache(keys, values, slots, positions, rows, block)
    for name, new, cache in (("new_keys", new_keys, keys), ("new_values", new_values, values)):
        expected = (rows, cache.shape[1], block, cache.shape[3])
        if new.shape != expected:
            raise ValueError(f"{name} of shape {tuple(new.shape)}: expected {expected}, by the cache and positions")
        if new.dtype != cache.dtype:
            raise TypeError(f"{name} of dtype {new.dtype}: expected {cache.dtype}, as the cache has")


def check_cache(keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, rows: int, block: int) -> None:
    """Check that caches, slots and positions fit together. Raises TypeError or ValueError that names the argument.

    rows, block: the rows of the call, and the tokens in each row.
    """
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        shapes = f"keys of shape {tuple(keys.shape)}, values of shape {tuple(values.shape)}"
        raise ValueError(f"{shapes}: expected [S, Hkv, C, D] and [S, Hkv, C, Dv]")
    for name, tensor, shape in (("slots", slots, (rows,)), ("positions", positions, (rows, block))):
        if tensor.shape != shape:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: expected {shape}, by the rows and their tokens")
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} of dtype {tensor.dtype}: expected int64")
        size = keys.shape[0 if name == "slots" else 2]
        if tensor.is_cpu and bool(((tensor < 0) | (tensor >= size)).any()):  # on a GPU it would wait for the device
            raise ValueError(f"{name} from {tensor.min()} to {tensor.max()}: expected 0..{size - 1}, as the cache has")


def _check_numbers(capacity: int, scale: float, window: int | None, softcap: float | None, limit: int | None) -> None:
    if not hasattr(scale, "__float__"):
        raise TypeError(f"scale={scale!r}: expected a number")
    for name, number in (("window", window), ("limit", limit)):
        if number is not None and not (hasattr(number, "__index__") and number >= 1):
            raise ValueError(f"{name}={number!r}: expected an integer of at least 1, or None")
    if limit is not None and limit > capacity:
        raise ValueError(f"limit={limit}: expected at most {capacity}, the capacity of the cache")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap={softcap}: expected a finite number above 0, or None")
