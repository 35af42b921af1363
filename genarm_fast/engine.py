"""The decode loop: prompts are prefilled in chunks, and running rows advance in rounds.

Between rounds every backbone has seen all but the last token of each running row. A round feeds that token and the
drafts that follow it, draws the target of each of these positions, and settles targets up to the first one that was
not foretold. Without drafts this is plain decoding. Drafts change how many rounds a text takes, never the text:
drafter and target draw a position with the same noise (docs/design.md).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .backbone import Backbone, in_one_forward, padded
from .members import Member
from .requests import Row
from .sampling import Sampler
from .slots import Seat, Slots


class Engine:
    """One run over some rows. Rows are changed in place; one that fails gets its `error` set and ends alone.

    ARMs that no row weighs or reports are left out, unless `steered`: then weights may change between rounds.
    """

    def __init__(
        self, members: Sequence[Member], rows: Sequence[Row], vocab_size: int, *, slots: int, steered: bool = False
    ) -> None:
        arms = [
            i
            for i in range(len(members) - 1)
            if steered or any(row.weights[i] != 0 or row.request.params.rewards for row in rows)
        ]
        indices = [0, *(i + 1 for i in arms)]
        running = [members[i] for i in indices]
        slots = min(slots, len(rows))
        capacity = max(
            len(row.request.token_ids[i]) + row.request.params.max_new_tokens for row in rows for i in indices
        )
        self.slots = Slots(slots, rows, indices)
        self.groups = in_one_forward(running)  # of positions in `indices`
        self.backbones = [Backbone([running[i] for i in group], slots, capacity) for group in self.groups]
        self.sampler = Sampler(running, arms, vocab_size)

    @torch.inference_mode()
    def run(self) -> Iterator[list[Row]]:
        """Decode all rows, yielding after each round those that it advanced."""
        while self.slots:
            self.slots.admit()
            self.prefill()
            if self.slots.running:
                yield self.round(self.slots.running)

    def prefill(self) -> None:
        """One chunk; then seats whose prompts are complete join the running ones."""
        seats, width = self.slots.chunk()
        if seats:
            start = seats[0].done
            for group, backbone in zip(self.groups, self.backbones):
                tokens = [[padded(seat.prompts[i][start : start + width], width) for seat in seats] for i in group]
                positions = torch.arange(start, start + width).expand(len(group), len(seats), width)
                backbone.prefill(torch.tensor(tokens), positions, [seat.slot for seat in seats], start + width)
            for seat in seats:
                seat.done = min(start + width, seat.needed)
        for donor, seat in self.slots.copies():
            for backbone in self.backbones:
                backbone.copy(donor.slot, seat.slot, seat.common)
        if self.backbones[0].device.type == "cuda":
            torch.cuda.synchronize()
        self.slots.start()

    def round(self, seats: Sequence[Seat]) -> list[Row]:
        """Settle at least one token of every seat."""
        rows = [seat.row for seat in seats]
        drafts: list[list[int]] = [[] for _ in rows]
        logits: list[Tensor] = [torch.empty(0)] * sum(map(len, self.groups))
        for g, group in enumerate(self.groups):
            for i, each in zip(group, self.feed(g, seats, drafts)):
                logits[i] = each
        draws = self.sampler.draw(rows, logits, drafts)
        for row, settled in zip(rows, draws):
            for draw in settled:
                if row.finish_reason is None:
                    row.settle(draw)
        now = time.perf_counter()
        for row in rows:
            row.finished = now
        ended = [seat for seat in seats if seat.row.ended]
        for seat in ended:
            if seat.row.error is not None:
                for backbone in self.backbones:
                    backbone.clear(seat.slot)
        self.slots.leave(ended)
        return rows

    def feed(self, g: int, seats: Sequence[Seat], drafts: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """Each seat's last token and its drafts through backbone g → each lane's logits [R, 1 + most drafts, V]."""
        width = 1 + max(map(len, drafts))
        tokens, starts = [], []
        for i in self.groups[g]:
            member = self.slots.members[i]
            for seat, draft in zip(seats, drafts):
                row = seat.row
                last = row.tokens[-1] if row.tokens else row.request.token_ids[member][-1]
                tokens.append(padded([last, *draft], width))
                starts.append(len(seat.prompts[i]) + len(row.tokens))
        shape = (len(self.groups[g]), len(seats))
        positions = torch.tensor(starts)[:, None] + torch.arange(width)
        return self.backbones[g].forward(
            torch.tensor(tokens).view(*shape, width),
            positions.view(*shape, width),
            [seat.slot for seat in seats],
            max(starts) + width,
        )
