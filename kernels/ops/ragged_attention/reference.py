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


def attention_specification(
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
) -> Tensor:
    """The specification of `ragged_attention`: scaled_dot_product_attention under an explicit mask.

    Query heads that share a key-value head are folded into the query axis. What lies beyond a row's furthest query is
    zeroed, so it may hold anything; between the queries of one block it must be finite.
    """
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
    return out.reshape(rows, heads, block, values.shape[3]).transpose(1, 2).contiguous()


def append_specification(
    keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, slots: Tensor, positions: Tensor
) -> None:
    """The specification of `ragged_append`; where two tokens share an entry, either may be left there."""
    for cache, new in ((keys, new_keys), (values, new_values)):
        cache[slots[:, None], :, positions] = new.transpose(1, 2)
