"""Who proposes tokens. Proposals cost time where they are wrong, and nothing else: every one is verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from math import inf
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from genarm_fast.device.base import Stream
from genarm_fast.engine.model_runner import padded
from genarm_fast.engine.scheduler import Seat
from genarm_fast.engine.sequence import Row
from genarm_fast.speculation.ngram_drafter import NgramIndex

if TYPE_CHECKING:
    from genarm_fast.engine.engine import Engine


AHEAD = 0.1  # of rounds have to find every draft of every row right, or nothing is drafted ahead
MEMORY = 8.0  # rounds, of that


class Drafts:
    """Proposals of a round: of row r the first counts[r] of `tensor`, int64 [R, k] on `stream`.

    read: gives the tensor, or a wider one, on the host. drafter: if it was a backbone. whole: whether that has seen the
    last draft, too. marks, steps: around so many of its forwards, for which the others had to wait.
    """

    def __init__(
        self,
        tensor: Tensor,
        counts: Sequence[int],
        stream: Stream,
        read: Callable[[], Tensor] | None = None,
        *,
        drafter: BackboneDrafter | None = None,
        marks: tuple[Any, Any] | None = None,
        steps: int = 0,
    ) -> None:
        self.tensor, self.counts, self.stream, self.read = tensor[:, : max(counts)], counts, stream, read
        self.drafter, self.whole, self.marks, self.steps = drafter, False, marks, steps

    @property
    def group(self) -> int | None:
        return None if self.drafter is None else self.drafter.group

    @property
    def most(self) -> int:
        return max(self.counts)

    @cached_property
    def host(self) -> list[list[int]]:
        """Waits for the device where it drafted."""
        assert self.read is not None
        return self.read().tolist()

    @cached_property
    def tokens(self) -> list[list[int]]:
        """Of each row."""
        return [line[:count] for line, count in zip(self.host, self.counts)]


def no_drafts(rows: int) -> Drafts:
    nothing = torch.empty(rows, 0, dtype=torch.int64)
    return Drafts(nothing, [0] * rows, None, lambda: nothing)


class Chain:
    """Steps of one backbone over some seats: each feeds what the one before drew. All of them on its stream.

    Step n feeds the last settled token, if n = 0, or the draft of step n - 1, and draws the draft of the next position.
    """

    def __init__(self, engine: Engine, group: int, seats: Sequence[Seat]) -> None:
        self.engine, self.group, self.seats = engine, group, list(seats)
        self.stream = engine.backbones[group].stream
        self.start = [len(seat.row.tokens) for seat in seats]
        self.tokens: list[Tensor] = []  # int64 [R, 1] each
        self.logits: list[Sequence[Tensor]] = []  # of each lane, [R, 1, V]

    def __len__(self) -> int:
        return len(self.tokens)

    def stands(self, seats: Sequence[Seat]) -> bool:
        """Whether step 0 comes next for these seats."""
        return self.seats == list(seats) and self.start == [len(seat.row.tokens) for seat in seats]

    def extend(self, steps: int) -> int:
        """Have so many steps; how many were missing."""
        missing = steps - len(self)
        for _ in range(missing):
            self.step()
        return max(missing, 0)

    def step(self) -> None:
        engine, n = self.engine, len(self)
        rows, members = [seat.row for seat in self.seats], engine.groups[self.group]
        logits = engine.feed(self.group, self.seats, self.tokens[-1] if n else None, first=n)
        positions = engine.device.upload(torch.tensor([[start + n] for start in self.start]), self.stream)
        inputs = (rows, logits, members, positions, self.stream)
        self.tokens.append(engine.device.launch(self.stream, "draft", engine.sampler.propose, *inputs))
        self.logits.append(logits)

    def block(self, width: int) -> Tensor:
        """The first drafts, [R, width]."""
        return self.engine.device.launch(self.stream, "draft", torch.cat, self.tokens[:width], 1)

    def settled(self, lines: Sequence[Sequence[int]]) -> bool:
        """Whether these first drafts of every row, and no more, are in its text now, which goes on."""
        return all(
            not seat.row.ended and seat.row.tokens[start:] == line
            for seat, start, line in zip(self.seats, self.start, lines)
        )

    def advance(self, steps: int) -> None:
        """Go on after this many steps, of which every token was settled."""
        del self.tokens[:steps], self.logits[:steps]
        self.start = [start + steps for start in self.start]


class BackboneDrafter:
    """The members of one backbone, token by token, sharpened to the weight of all members together.

    They stand for the guided distribution: q ∝ (Π π_i^w_i)^s with s = Σ_all w / Σ_drafting w. So a small ARM drafts
    from π_arm^((1 + w)/T), and its forwards are not wasted: what it says of each token is part of the target.

    Where the device runs behind the host, it goes on from its own last draft while the others verify. If all rows
    settle all of that, the next block is there, or begun; else it is dropped, as wrong drafts are.
    """

    def __init__(self, engine: Engine, group: int, names: Sequence[str]) -> None:
        self.engine, self.group, self.names = engine, group, tuple(names)
        self.chain: Chain | None = None
        self.right: float | None = None  # share of rounds without a wrong draft, of late
        self.fitting = inf  # steps that take no longer than verification, as last measured

    def propose(self, seats: Sequence[Seat], most: Sequence[int]) -> Drafts:
        """At most so many for each seat. Each is fed to the next step where it was drawn, on the device."""
        engine, k = self.engine, max(most)
        if self.chain is None or not self.chain.stands(seats):
            if self.group == engine.draft_model:
                engine.catch_up(seats)
            self.chain = Chain(engine, self.group, seats)
        if self.right is None:
            self.right = 1 / len(seats)  # for want of anything better
        stream = self.chain.stream
        start = engine.device.mark(stream)
        steps = self.chain.extend(k)
        marks = start, engine.device.mark(stream)
        return Drafts(self.chain.block(k), most, stream, drafter=self, marks=marks, steps=steps)

    def join(self, drafts: Drafts) -> dict[int, Tensor]:
        """What its members say of the drafts, for the main stream: by member, [R, k, V], or k + 1 if it goes on.

        Call it when what the others verify is launched.
        """
        engine, chain, k = self.engine, self.chain, drafts.most
        assert chain is not None
        if engine.device.lag:
            chain.extend(k + 1)
        drafts.whole = len(chain) > k
        width = k + drafts.whole
        read = engine.device.read([chain.block(width)], chain.stream)
        drafts.read = lambda: read()[0]
        known = {}
        if self.group != engine.draft_model:
            steps = engine.collect(self.group, [lane for logits in chain.logits[:width] for lane in logits])
            members = engine.groups[self.group]
            known = {member: torch.cat(steps[i :: len(members)], dim=1) for i, member in enumerate(members)}
        if engine.device.lag:  # after what the main stream waits for
            chain.extend(self.ahead(k))
        return known

    def ahead(self, k: int) -> int:
        """Steps to have before a verification ends: up to the last draft of the next block, as many as fit."""
        assert self.chain is not None
        assert self.right is not None
        if self.right < AHEAD:
            return k + 1
        left = min(seat.row.remaining for seat in self.chain.seats)
        return min(2 * k + 1, left, k + max(1, int(min(self.fitting, k + 1))))

    def settled(self, drafts: Drafts, accepted: Sequence[int], drafting: float, verifying: float) -> None:
        """Keep the steps after this round's, if they stand on what was settled. It took so many seconds."""
        chain, k = self.chain, drafts.most
        assert chain is not None
        assert self.right is not None
        if drafts.steps and drafting > 0:
            self.fitting = verifying / (drafting / drafts.steps)
        self.right += (all(right == k for right in accepted) - self.right) / MEMORY
        if drafts.whole and chain.settled(drafts.host):
            chain.advance(k + 1)
        else:
            self.chain = None

    def look(
        self, rows: Sequence[Row], logits: Sequence[Tensor], positions: Tensor
    ) -> Callable[[], tuple[list[list[int]], float]]:
        """What it would propose at positions [R, 1], given every member's logits [R, q, V] there, and seconds of that,
        with those of its latest forward. Call the result when the targets were read."""
        engine = self.engine
        members = engine.groups[self.group]
        start = engine.device.mark(engine.main)
        lanes = [logits[i][:, :1] for i in members]
        tokens = engine.sampler.propose(rows, lanes, members, positions, engine.main)
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
        start = self.engine.device.mark(self.engine.main)
        tokens = self.guess(seats, most)
        width = max(map(len, tokens))
        if width == 0:
            return no_drafts(len(seats))
        block = torch.tensor([padded(line, width) for line in tokens])
        main = self.engine.main
        return Drafts(
            self.engine.device.upload(block, main),
            [*map(len, tokens)],
            main,
            lambda: block,
            marks=(start, self.engine.device.mark(main)),
            steps=width,
        )
