"""The key-value cache of members that run in one forward, for a batch of rows, and the forwards that extend it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from .lanes import running
from .members import Member


class Cache:
    """L members of one backbone, each with R rows; lane after lane, they make the L·R rows of a forward.

    Rows have unequal lengths, padded on the left. Positions count each row's own tokens, so padding changes nothing.
    """

    def __init__(self, *members: Member) -> None:
        first = members[0]
        self.lanes = [member.lane for member in members]
        self.model = first.shared if len(members) > 1 else first.model
        self.accepts = first.accepts
        self.device = first.device
        self.cache = DynamicCache(config=first.model.config)
        self.mask: Tensor | None = None  # int64 [L·R, tokens so far], 0 where padded

    def prefill(self, prompts: Sequence[Sequence[Sequence[int]]]) -> tuple[Tensor, ...]:
        """Prompts, not empty, of each row of each member → each member's logits of each row's next token [R, V]."""
        rows = [prompt for lane in prompts for prompt in lane]
        return self.forward(*pad_left(rows, self.device), keep=1)[:, -1].chunk(len(self.lanes))

    def decode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """One token per row, the same for all members, int64 [R] → each member's logits of the next one [R, V]."""
        tokens = tokens.to(self.device).repeat(len(self.lanes))[:, None]
        return self.forward(tokens, torch.ones_like(tokens), keep=1)[:, -1].chunk(len(self.lanes))

    def forward(self, tokens: Tensor, mask: Tensor, *, keep: int) -> Tensor:
        """Tokens and mask, int64 [L·R, q] → logits of the last `keep` positions [L·R, keep, V]; it grows by q."""
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        length = tokens.shape[1]
        inputs = {
            "position_ids": (self.mask.cumsum(1) - 1).clamp_min(0)[:, -length:],
            # A number would slice: of a hidden state that is not contiguous, F.linear copies the weight for every row.
            # The index stays on the CPU, since the last layer may be on another device than the first.
            "logits_to_keep": keep if keep == length else torch.arange(length - keep, length),
        }
        with running(self.lanes, len(tokens) // len(self.lanes)):
            logits = self.model(
                input_ids=tokens,
                attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
                **{name: value for name, value in inputs.items() if name in self.accepts},
            ).logits
        return logits[:, -keep:]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows of every member, in this order; a row may be repeated."""
        assert self.mask is not None
        size = len(self.mask) // len(self.lanes)
        index = torch.tensor([lane * size + row for lane in range(len(self.lanes)) for row in rows], device=self.device)
        self.mask = self.mask[index]
        self.cache.reorder_cache(index)  # type: ignore[arg-type]  # indexes the batch dimension of every layer


def pad_left(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [R, longest]. The padding id is never looked at, so no pad token is needed."""
    width = max(map(len, sequences))
    tokens = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences], device=device)
    return tokens, mask
