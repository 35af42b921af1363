"""Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): draft tokens from the text itself.

Row r's text is t_0 .. t_{L-1}. An end e < L matches n tokens if t_{e-n} .. t_{e-1} are the text's last n tokens. Among
the ends that match, those of the largest n in min_n .. max_n count, and among these the last one. Draft i is the token
that followed there, t_{e + i mod (L - e)}. So a repetition that reaches the end of the text continues in the drafts. If
no end matches, the drafts are -1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def specification(tokens: Tensor, lengths: Tensor, k: int, max_n: int, min_n: int) -> Tensor:
    """The specification of `ngram_lookup` in plain PyTorch."""
    width = tokens.shape[1]
    ends, last = torch.arange(width, device=tokens.device), lengths[:, None].to(torch.int64).clamp(0, width) - 1
    alive = ends <= last
    matched = torch.zeros(tokens.shape, dtype=torch.int64, device=tokens.device)
    for j in range(max_n if width else 0):
        before, theirs = ends - 1 - j, last - j
        same = tokens[:, before.clamp_min(0)] == tokens.gather(1, theirs.clamp_min(0))
        alive = alive & same & (before >= 0) & (theirs >= 0)
        matched += alive
    rank = torch.where(matched >= min_n, matched * width + ends, -1)
    best = rank.amax(1, keepdim=True) if width else rank.new_full((len(tokens), 1), -1)
    end = best.clamp_min(0) % max(width, 1)
    index = end + torch.arange(k, device=tokens.device) % torch.where(best < 0, 1, last + 1 - end)
    return tokens.gather(1, index).to(torch.int64).masked_fill(best < 0, -1) if width else index.fill_(-1)
