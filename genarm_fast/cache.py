"""One member's key-value cache for a batch of rows, and the forwards that read and extend it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from .members import Member


class MemberCache:
    """Rows of unequal length, padded on the left. Positions count each row's own tokens, so padding changes nothing."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.device = member.device
        self.cache = DynamicCache(config=member.model.config)
        self.mask: Tensor | None = None  # int64 [R, tokens so far], 0 where padded

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Prompts, not empty → logits of each row's next token [R, V]."""
        return self.forward(*pad_left(prompts, self.device), keep=1)[:, -1]

    def decode(self, tokens: Tensor) -> Tensor:
        """One token per row, int64 [R] → logits of the next one [R, V]."""
        tokens = tokens.to(self.device)[:, None]
        return self.forward(tokens, torch.ones_like(tokens), keep=1)[:, -1]

    def forward(self, tokens: Tensor, mask: Tensor, *, keep: int) -> Tensor:
        """Tokens and mask, int64 [R, q] → logits of the last `keep` positions [R, keep, V]; the cache grows by q."""
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        inputs = {
            "position_ids": (self.mask.cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :],
            "logits_to_keep": keep,
        }
        logits = self.member.model(
            input_ids=tokens,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **{name: value for name, value in inputs.items() if name in self.member.accepts},
        ).logits
        return logits[:, -keep:]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be repeated."""
        assert self.mask is not None
        index = torch.LongTensor(rows).to(self.device)
        self.mask = self.mask[index]
        self.cache.reorder_cache(index)  # type: ignore[arg-type]  # indexes the batch dimension of every layer


def pad_left(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [R, longest]. The padding id is never looked at, so no pad token is needed."""
    width = max(map(len, sequences))
    tokens = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences], device=device)
    return tokens, mask
