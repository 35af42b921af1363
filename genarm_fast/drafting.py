"""Who proposes tokens. Proposals cost time where they are wrong, and nothing else: every one is verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .backbone import padded
from .ngram import NgramIndex
from .requests import Row
from .slots import Seat

if TYPE_CHECKING:
    from .engine import Engine


class Drafts:
    """Proposals of a round: of row r the first counts[r] of `tensor`, int64 [R, k] on the main stream.

    read: gives the tensor on the host. logits: [R, k, V] of each lane of the backbone `group`, if one drafted.
    """

    def __init__(
        self,
        tensor: Tensor,
        counts: Sequence[int],
        read: Callable[[], Tensor],
        logits: Sequence[Tensor] = (),
        group: int | None = None,
    ) -> None:
        self.tensor, self.counts, self.read = tensor[:, : max(counts)], counts, read
        self.logits, self.group = logits, group

    @property
    def most(self) -> int:
        return max(self.counts)

    @cached_property
    def tokens(self) -> list[list[int]]:
        """Of each row. Waits for the device where it drafted."""
        return [line[:count] for line, count in zip(self.read().tolist(), self.counts)]


def no_drafts(rows: int) -> Drafts:
    nothing = torch.empty(rows, 0, dtype=torch.int64)
    return Drafts(nothing, [0] * rows, lambda: nothing)


class BackboneDrafter:
    """The members of one backbone, token by token, sharpened to the weight of all members together.

    They stand for the guided distribution: q ∝ (Π π_i^w_i)^s with s = Σ_all w / Σ_drafting w. So a small ARM drafts
    from π_arm^((1 + w)/T), and its forwards are not wasted: what it says of each token is part of the target.
    """

    def __init__(self, engine: Engine, group: int, names: Sequence[str]) -> None:
        self.engine, self.group, self.names = engine, group, tuple(names)

    def propose(self, seats: Sequence[Seat], most: Sequence[int]) -> Drafts:
        """At most so many for each seat. Each is fed to the next step where it was drawn, on the device."""
        engine = self.engine
        rows, members = [seat.row for seat in seats], engine.groups[self.group]
        if self.group == engine.draft_model:
            engine.catch_up(seats)
        tokens: list[Tensor] = []
        steps = []
        for step in range(max(most)):
            fed = engine.feed(self.group, seats, tokens[-1] if tokens else None, first=step)
            steps.append(engine.collect(self.group, fed))
            tokens.append(engine.sampler.propose(rows, steps[-1], members, engine.sampler.positions(rows, step, 1)))
        block = torch.cat(tokens, dim=1)
        read = engine.device.read([block], engine.main)
        return Drafts(block, most, lambda: read()[0], [torch.cat(lane, dim=1) for lane in zip(*steps)], self.group)

    def look(
        self, rows: Sequence[Row], logits: Sequence[Tensor], positions: Tensor
    ) -> Callable[[], tuple[list[list[int]], float]]:
        """What it would propose at positions [R, 1], given every member's logits [R, q, V] there, and seconds of that,
        with those of its latest forward. Call the result when the targets were read."""
        engine = self.engine
        members = engine.groups[self.group]
        start = engine.device.mark(engine.main)
        tokens = engine.sampler.propose(rows, [logits[i][:, :1] for i in members], members, positions)
        spent = [engine.spent[self.group], (start, engine.device.mark(engine.main))]
        read = engine.device.read([tokens], engine.main)
        return lambda: (read()[0].tolist(), sum(engine.device.elapsed(*marks) for marks in spent))


class NgramDrafter:
    """What followed the last tokens when they came before, in the base's prompt or the response."""

    names = ("ngram",)

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.indices: WeakKeyDictionary[Seat, NgramIndex] = WeakKeyDictionary()

    def guess(self, seats: Sequence[Seat], most: Sequence[int]) -> list[list[int]]:
        """At most so many for each seat."""
        tokens = []
        for seat, count in zip(seats, most):
            index = self.indices.get(seat)
            if index is None:
                index = self.indices[seat] = NgramIndex(seat.row.request.token_ids[0])
            index.extend(seat.row.tokens[len(index) - len(seat.row.request.token_ids[0]) :])
            tokens.append(index.propose(count))
        return tokens

    def propose(self, seats: Sequence[Seat], most: Sequence[int]) -> Drafts:
        tokens = self.guess(seats, most)
        width = max(map(len, tokens))
        if width == 0:
            return no_drafts(len(seats))
        block = torch.tensor([padded(line, width) for line in tokens])
        return Drafts(self.engine.device.upload(block, self.engine.main), [*map(len, tokens)], lambda: block)
