"""Cosines and sines of a rotary embedding, looked up instead of computed.

After a forward has emptied the caches of a CPU, computing them takes 190 µs and looking them up 70; in a loop it is 25
and 7 (by hand, one row of SmolLM2-135M, AMD EPYC with AVX-512, 2026-11-29).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FIRST = 512  # positions of the first table; each next one is twice as long
MOST = 1 << 14  # 8 MB in bfloat16 for heads of 128
CHANGING = ("dynamic", "longrope")  # in names of rope types whose frequencies depend on how long the text is


class Angles:
    """What `rotary`, a rotary embedding of transformers, gives, with its bits.

    It serves one dtype, that of the first call. Frequencies that change with the text are computed by each call, and so
    is what lies beyond the longest table.
    """

    def __init__(self, rotary: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.rotary = rotary
        kind: Any = getattr(rotary, "rope_type", None)
        self.fixed = isinstance(kind, str) and not any(name in kind for name in CHANGING)
        self.table: tuple[Tensor, Tensor] | None = None  # [positions, width] each

    def __call__(self, hidden: Tensor, positions: Tensor, bound: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, q, width] in the dtype of `hidden`. positions: int64 [N, q], below `bound`."""
        if not self.fixed or bound > MOST:
            return self.rotary(hidden, position_ids=positions)
        if self.table is None or len(self.table[0]) < bound:
            count = max(FIRST, 1 << (bound - 1).bit_length())
            cos, sin = self.rotary(hidden, position_ids=torch.arange(count, device=hidden.device)[None])
            self.table = cos[0].contiguous(), sin[0].contiguous()
        cos, sin = self.table
        return functional.embedding(positions, cos), functional.embedding(positions, sin)
