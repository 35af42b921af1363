"""Who proposes tokens. Proposals cost time where they are wrong, and nothing else: every one is verified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .ngram import NgramIndex
from .slots import Seat

if TYPE_CHECKING:
    from .engine import Engine


class Drafts:
    """Proposals of a round. tokens: per seat. logits: [R, k, V] of each lane of the backbone `group`, if one did."""

    def __init__(self, tokens: list[list[int]], logits: Sequence[Tensor] = (), group: int | None = None) -> None:
        self.tokens, self.logits, self.group = tokens, logits, group

    @property
    def most(self) -> int:
        return max(map(len, self.tokens))

    def clip(self, seats: Sequence[Seat]) -> None:
        """Drop what cannot be settled: the last token of a response is a target that needs no draft."""
        for seat, tokens in zip(seats, self.tokens):
            del tokens[seat.row.remaining - 1 :]


class BackboneDrafter:
    """The members of one backbone, token by token, sharpened to the weight of all members together.

    They stand for the guided distribution: q ∝ (Π π_i^w_i)^s with s = Σ_all w / Σ_drafting w. So a small ARM drafts
    from π_arm^((1 + w)/T), and its forwards are not wasted: what it says of each token is part of the target.
    """

    def __init__(self, engine: Engine, group: int, names: Sequence[str]) -> None:
        self.engine, self.group, self.names = engine, group, tuple(names)

    def propose(self, seats: Sequence[Seat], k: int) -> Drafts:
        rows = [seat.row for seat in seats]
        tokens: list[list[int]] = [[] for _ in seats]
        steps = []
        for step in range(k):
            lanes = self.engine.feed(self.group, seats, tokens, first=step)
            steps.append(lanes)
            proposed = self.engine.sampler.propose(rows, lanes, self.engine.groups[self.group], step)
            for row_tokens, token in zip(tokens, proposed):
                row_tokens.append(token)
        return Drafts(tokens, [torch.cat(lane, dim=1) for lane in zip(*steps)], self.group)


class NgramDrafter:
    """What followed the last tokens when they came before, in the base's prompt or the response."""

    names = ("ngram",)

    def __init__(self) -> None:
        self.indices: WeakKeyDictionary[Seat, NgramIndex] = WeakKeyDictionary()

    def propose(self, seats: Sequence[Seat], k: int) -> Drafts:
        tokens = []
        for seat in seats:
            index = self.indices.get(seat)
            if index is None:
                index = self.indices[seat] = NgramIndex(seat.row.request.token_ids[0])
            index.extend(seat.row.tokens[len(index) - len(seat.row.request.token_ids[0]) :])
            tokens.append(index.propose(k))
        return Drafts(tokens)
