"""Attention over a static key-value cache in which every row has its own slot and its own position.

    y[n, i, h] = Σ_j softmax_j( f(scale · q[n, h, i] · k[s, g, j]) ) v[s, g, j]        s = slots[n], g = h · Hkv / Hq

over the entries j = 0 .. p of the slot, p = positions[n, i], of which a sliding window keeps the last `window`;
f(x) = c · tanh(x / c) with a softcap c. Rows of unequal lengths need no padding and no mask, a row is rolled back by
moving its position, and the cost is that of the entries that are attended: no dense mask, no copy of a key for every
query head that shares it.

On the CPU, in C++, a query's result is the same bit for bit in whatever company it comes: other rows, other queries of
the block, the cache's capacity. So a block of drafted tokens gets the logits of one-token decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native, custom_ops


def ragged_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    limit: int | None = None,
) -> Tensor:
    """The specification of `ragged_attention`: scaled_dot_product_attention under an explicit mask.

    Query heads that share a key-value head are folded into the query axis. What lies beyond a row's furthest query is
    zeroed, so it may hold anything; between the queries of one block it must be finite.
    """
    check_attention(query, keys, values, slots, positions)
    check_numbers(keys.shape[2], scale, window, softcap, limit)
    rows, heads, block, width = query.shape
    kv_heads, group = keys.shape[1], heads // keys.shape[1]
    index = torch.arange(keys.shape[2] if limit is None else limit, device=query.device)
    furthest = positions.amax(1, keepdim=True) if block else positions.new_zeros(rows, 1)
    unwritten = (index > furthest)[:, None, :, None]
    keys, values = (cache[slots, :, : len(index)].masked_fill(unwritten, 0) for cache in (keys, values))
    last = positions[:, :, None]
    seen = index <= last if window is None else (index <= last) & (index > last - window)
    seen = seen[:, None].repeat(1, 1, group, 1)  # [N, 1, group · q, entries]
    folded = query.reshape(rows, kv_heads, group * block, width)
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(folded, keys, values, attn_mask=seen, scale=scale)
    else:
        precise = torch.promote_types(query.dtype, torch.float32)
        scores = folded.to(precise) @ keys.to(precise).mT
        scores = softcap * torch.tanh(scores * (scale / softcap))
        out = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values.to(precise)).to(query.dtype)
    return out.view(rows, heads, block, values.shape[3]).transpose(1, 2).contiguous()


def check_attention(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor) -> None:
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


def check_numbers(capacity: int, scale: float, window: int | None, softcap: float | None, limit: int | None) -> None:
    if not hasattr(scale, "__float__"):
        raise TypeError(f"scale={scale!r}: expected a number")
    for name, number in (("window", window), ("limit", limit)):
        if number is not None and not (hasattr(number, "__index__") and number >= 1):
            raise ValueError(f"{name}={number!r}: expected an integer of at least 1, or None")
    if limit is not None and limit > capacity:
        raise ValueError(f"limit={limit}: expected at most {capacity}, the capacity of the cache")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap={softcap}: expected a finite number above 0, or None")


def check_cache(keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, rows: int, block: int) -> None:
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        shapes = f"keys of shape {tuple(keys.shape)}, values of shape {tuple(values.shape)}"
        raise ValueError(f"{shapes}: expected [S, Hkv, C, D] and [S, Hkv, C, Dv]")
    for name, tensor, shape in (("slots", slots, (rows,)), ("positions", positions, (rows, block))):
        if tensor.shape != shape:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: expected {shape}, by the rows and their tokens")
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} of dtype {tensor.dtype}: expected int64")
        size = keys.shape[0 if name == "slots" else 2]
        if tensor.is_cpu and bool(((tensor < 0) | (tensor >= size)).any()):  # elsewhere it would wait for the device
            raise ValueError(f"{name} from {tensor.min()} to {tensor.max()}: expected 0..{size - 1}, as the cache has")


def ragged_attention(
    query: Tensor,  # [N, Hq, q, D], any strides
    keys: Tensor,  # [S, Hkv, C, D], Hq a multiple of Hkv
    values: Tensor,  # [S, Hkv, C, Dv]
    slots: Tensor,  # int64 [N]: the slot in which a row lives
    positions: Tensor,  # int64 [N, q]: where each query stands; it sees the entries up to there
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    limit: int | None = None,
) -> Tensor:
    """Attend each query to the entries 0 .. position of its row's slot → [N, q, Hq, Dv], contiguous.

    In C++ on the CPU for float32 and bfloat16, with sums in float32, where no gradient is needed; otherwise
    `ragged_attention_reference`, which reads the whole capacity unless `limit`, a bound on positions + 1 known to the
    host, says less. Entries beyond a position may hold anything, NaN too, and change nothing (the reference: beyond the
    row's furthest position).

    Raises:
        TypeError: dtypes that differ; slots or positions that are not int64.
        ValueError: shapes that do not fit together, a window, softcap or limit out of range; on the CPU, a slot or
            position that the cache does not have.
    """
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, keys, values))
    if torch.compiler.is_compiling() and not needs_gradient:
        return custom_ops.ragged_attention(query, keys, values, slots, positions, scale, window, softcap, limit)
    if _native.core is not None and not needs_gradient:
        tensors = (query, keys, values, slots, positions)
        options = (scale, window, softcap, torch.get_num_threads())
        out = _native.core.ragged_attention(*tensors, *options)
        if out is None and all(tensor.is_cpu for tensor in tensors):
            out = _native.core.ragged_attention(*map(_native.plain, tensors), *options)
        if out is not None:
            return out
    return ragged_attention_reference(
        query, keys, values, slots, positions, scale=scale, window=window, softcap=softcap, limit=limit
    )


def ragged_append_reference(
    keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, slots: Tensor, positions: Tensor
) -> None:
    """The specification of `ragged_append`; where two tokens share an entry, either may be left there."""
    check_append(keys, values, new_keys, new_values, slots, positions)
    for cache, new in ((keys, new_keys), (values, new_values)):
        cache[slots[:, None], :, positions] = new.transpose(1, 2)


def check_append(
    keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, slots: Tensor, positions: Tensor
) -> None:
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


def ragged_append(
    keys: Tensor,  # [S, Hkv, C, D], written in place
    values: Tensor,  # [S, Hkv, C, Dv], written in place
    new_keys: Tensor,  # [N, Hkv, q, D], any strides
    new_values: Tensor,  # [N, Hkv, q, Dv], any strides
    slots: Tensor,  # int64 [N]
    positions: Tensor,  # int64 [N, q]
) -> None:
    """Write row n's new token i to entry positions[n, i] of slot slots[n]; rows must not share a slot.

    In C++ on the CPU, for every dtype, if the cache is contiguous in its last dimension and no gradient is needed;
    otherwise by `ragged_append_reference`. Nothing is written if anything is wrong. On CUDA slots and positions are not
    looked at: a check would have to wait for the device, whose own assertion misses negative ones.

    Raises:
        TypeError: dtypes that differ; slots or positions that are not int64.
        ValueError: shapes that do not fit together; on the CPU, a slot or position that the cache does not have.
    """
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (keys, values, new_keys, new_values))
    if torch.compiler.is_compiling() and not needs_gradient:
        return custom_ops.ragged_append(keys, values, new_keys, new_values, slots, positions)
    if _native.core is not None and not needs_gradient:
        if _native.core.ragged_append(keys, values, new_keys, new_values, slots, positions):
            return
        new = (new_keys, new_values, slots, positions)
        if all(x.is_cpu for x in new) and _native.core.ragged_append(keys, values, *map(_native.plain, new)):
            return
    ragged_append_reference(keys, values, new_keys, new_values, slots, positions)
