"""Settle a block of draft tokens: count the drafts that are right, and cut the row at stop tokens and its limit.

Row r has the drafts d_1 .. d_k, k ≤ K. guided_sample drew the targets y_1 .. y_{k+1} with the noise that the drafter
used. The settled tokens are always targets, so drafting never changes the text. Their number is

    n = 1 + |longest prefix with d_i = y_i|        but at most up to the first stop token, and to the row's limit
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Settled(NamedTuple):
    """Result of `settle`. The settled tokens of row r are targets[r, :counts[r]].

    counts: int64 [R], settled tokens; 0 for rows that were finished before.
    next_tokens: int64 [R], the last settled token, which is the next step's input; any valid id for finished rows.
    lengths: int64 [R], tokens of the response including those now settled.
    finished: bool [R], whether a stop token or the limit ended the row, now or before.
    """

    counts: Tensor
    next_tokens: Tensor
    lengths: Tensor
    finished: Tensor


def specification(
    targets: Tensor,
    drafts: Tensor,
    lengths: Tensor,
    limits: Tensor,
    finished: Tensor,
    stop_ids: Tensor,
    draft_counts: Tensor | None = None,
) -> Settled:
    """The specification of `settle` in plain PyTorch."""
    width = targets.shape[1]
    index = torch.arange(width, device=targets.device)
    right = drafts == targets[:, :-1]
    if draft_counts is not None:
        right &= index[:-1] < draft_counts[:, None]
    counts = 1 + right.to(torch.int64).cumprod(-1).sum(-1)
    stops = (targets[:, :, None] == stop_ids.unsqueeze(-2)).any(-1)
    first_stop = torch.where(stops, index, width).amin(-1)
    room = limits - lengths  # may wrap below 0 if int64 can't hold it; the row then has room for the whole block
    room = room.masked_fill(room < 0, width).masked_fill(limits <= lengths, 0)
    counts = torch.minimum(torch.minimum(counts, first_stop + 1), room)
    counts = counts.masked_fill(finished, 0)
    lengths = lengths + counts
    next_tokens = targets.gather(-1, (counts - 1).clamp_min(0)[:, None]).squeeze(-1)
    return Settled(counts, next_tokens, lengths, finished | (counts > first_stop) | (lengths >= limits))
