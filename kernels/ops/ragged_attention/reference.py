"""Attention over a static key-value cache in which every row has its own slot and its own position.

    y[n, i, h] = Σ_j softmax_j( f(scale · q[n, h, i] · k[s, g, j]) ) v[s, g, j]        s = slots[n], g = h · Hkv / Hq

The sum is over the entries j = 0 .. p of the slot, with p = positions[n, i]. A sliding window keeps the last `window`
of them. f(x) = c · tanh(x / c) with a softcap c, else f(x) = x. Rows of unequal lengths need no padding and no mask,
and a row is rolled back by moving its position. The cost is that of the attended entries: the kernels need no dense
mask, and no copy of a key for every query head that shares it.

In C++ on the CPU, a query's result does not depend on other rows, on other queries of the block, or on the cache's
capacity: it is the same bit for bit. So a block of draft tokens gets the logits of one-token decoding.
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

    Query heads that share a key-value head are folded into the query axis. Entries beyond a row's furthest query are
    zeroed, so they may hold anything. Entries up to there must be finite, even those that some queries do not see.
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
    """The specification of `ragged_append`. If two tokens share an entry, either may be stored there."""
    for cache, new in ((keys, new_keys), (values, new_values)):
        cache[slots[:, None], :, positions] = new.transpose(1, 2)
