"""Rotary position embedding of queries and keys, as Llama and similar models apply it.

    y[d] = x[d] cos[d] - x[d + D/2] sin[d]        y[d + D/2] = x[d + D/2] cos[d + D/2] + x[d] sin[d + D/2]

So x[d] is paired with x[d + D/2], not with its neighbour. PyTorch takes ten operations for query and key, 28 µs for one
token on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_reference(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """The specification of `rotary`."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def rotate(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), dim=-1) * sin

    return rotate(query), rotate(key)
