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
from .drafting import BackboneDrafter, Drafts, NgramDrafter
from .members import Member
from .requests import Row
from .sampling import Sampler
from .slots import Seat, Slots
from .speculation import Controllers, Plan, Speculation


class Engine:
    """One run over some rows. Rows are changed in place; one that fails gets its `error` set and ends alone.

    ARMs that no row weighs or reports are left out, unless `steered`: then weights may change between rounds.
    """

    def __init__(
        self,
        members: Sequence[Member],
        rows: Sequence[Row],
        vocab_size: int,
        *,
        slots: int,
        steered: bool = False,
        speculation: Speculation,
        controllers: Controllers,
        draft_model: Member | None = None,
    ) -> None:
        arms = [
            i
            for i in range(len(members) - 1)
            if steered or any(row.weights[i] != 0 or row.request.params.rewards for row in rows)
        ]
        indices = [0, *(i + 1 for i in arms)]
        running = [members[i] for i in indices]
        self.sampler = Sampler(running, arms, vocab_size)
        self.groups = in_one_forward(running)  # of positions in `indices`
        self.draft_model = None if draft_model is None else len(self.groups)
        if draft_model is not None:  # sees the base's prompt
            self.groups.append([len(running)])
            running, indices = [*running, draft_model], [*indices, 0]
        slots = min(slots, len(rows))
        capacity = max(
            len(row.request.token_ids[i]) + row.request.params.max_new_tokens for row in rows for i in indices
        )
        capacity += speculation.most  # a row near its end may be padded as far
        self.slots = Slots(slots, rows, indices)
        self.backbones = [Backbone([running[i] for i in group], slots, capacity) for group in self.groups]
        self.drafters: list[BackboneDrafter | NgramDrafter] = [NgramDrafter()]
        if len(self.groups) > 1:
            own = [BackboneDrafter(self, g, [running[i].name for i in group]) for g, group in enumerate(self.groups)]
            self.drafters = [*own[1:], *self.drafters, own[0]]  # without a wish, an ARM comes before the base
        self.most = speculation.most
        # Other processes do not count in a thread's own time. A GPU's work is in no thread's.
        on_cpu = all(backbone.device.type == "cpu" for backbone in self.backbones)
        precise = time.get_clock_info("thread_time").resolution < 1e-4
        self.clock = time.thread_time if on_cpu and precise else time.perf_counter
        self.plan = Plan(speculation, [drafter.names for drafter in self.drafters], controllers)

    @torch.inference_mode()
    def run(self) -> Iterator[list[Row]]:
        """Decode all rows, yielding after each round those that it advanced."""
        while self.slots:
            self.slots.admit()
            self.prefill()
            if self.slots.running:
                yield self.round()

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

    def round(self) -> list[Row]:
        """Settle at least one token of every running row."""
        seats = list(self.slots.running)
        rows = [seat.row for seat in seats]
        drafter, k = self.plan.choose(len(rows))
        k = min(k, max(row.remaining for row in rows) - 1)
        lengths = [len(row.tokens) for row in rows]
        watched = self.watch(seats, drafter)
        start = self.clock()
        drafts = self.drafters[drafter].propose(seats, k) if drafter is not None and k else Drafts([[] for _ in rows])
        drafts.clip(seats)
        drafted = self.clock()
        logits = self.verify(seats, drafts)
        known = [each[:, : drafts.most] for each in logits] if drafts.logits else logits
        accepted = self.settle(rows, known, drafts.tokens)
        verified = self.clock()
        if drafts.logits:
            self.settle_bonus(seats, logits, drafts, accepted)
        drafting = drafted - start + self.clock() - verified
        proposed = [len(tokens) for tokens in drafts.tokens]
        self.plan.observe(drafter, len(rows), k, proposed, accepted, drafting, verified - drafted)
        for i, guesses in watched.items():
            self.plan.watch(i, guesses, [row.tokens[length:] for row, length in zip(rows, lengths)])

        now = time.perf_counter()
        for row, count, right in zip(rows, proposed, accepted):
            row.finished = now
            row.rounds += 1
            row.drafted += count
            row.accepted += right
        ended = [seat for seat in seats if seat.row.ended]
        for seat in ended:
            if seat.row.error is not None:
                for backbone in self.backbones:
                    backbone.clear(seat.slot)
        self.slots.leave(ended)
        return rows

    def watch(self, seats: Sequence[Seat], drafter: int | None) -> dict[int, list[list[int]]]:
        """What drafters that cost nothing would propose if it was their turn."""
        free = [i for i in self.plan.adaptive if i != drafter and isinstance(self.drafters[i], NgramDrafter)]
        return {i: self.drafters[i].propose(seats, self.most).tokens for i in free}

    def verify(self, seats: Sequence[Seat], drafts: Drafts) -> list[Tensor]:
        """Each member's logits after the last token and after every draft; of a drafting one, before the last draft."""
        logits: dict[int, Tensor] = {}
        for g, group in enumerate(self.groups):
            if g != self.draft_model:
                logits |= zip(group, drafts.logits if g == drafts.group else self.feed(g, seats, drafts.tokens))
        return [logits[i] for i in range(len(logits))]

    def settle(self, rows: Sequence[Row], logits: Sequence[Tensor], drafts: Sequence[Sequence[int]]) -> list[int]:
        """Give rows their targets; how many drafts of each were right."""
        accepted = []
        for row, draws, draft in zip(rows, self.sampler.draw(rows, logits, drafts), drafts):
            accepted.append(sum(draw.token == token for draw, token in zip(draws, draft)))
            for draw in draws:
                if row.finish_reason is None:
                    row.settle(draw)
        return accepted

    def settle_bonus(
        self, seats: Sequence[Seat], logits: Sequence[Tensor], drafts: Drafts, accepted: Sequence[int]
    ) -> None:
        """One more token for rows whose every draft was right: only the drafter has not seen the last one yet."""
        most, group = drafts.most, drafts.group
        assert group is not None
        index = [i for i, seat in enumerate(seats) if accepted[i] == most and not seat.row.ended]
        if index:
            again = [seats[i] for i in index]
            own = dict(zip(self.groups[group], self.feed(group, again, [[] for _ in again])))
            last = [own[i] if i in own else each[index, most:] for i, each in enumerate(logits)]
            self.settle([seat.row for seat in again], last, [[] for _ in again])

    def feed(
        self, g: int, seats: Sequence[Seat], drafts: Sequence[Sequence[int]], first: int = 0
    ) -> tuple[Tensor, ...]:
        """Each seat's last token and its drafts, from the `first` of these on, through backbone g.

        Returns each lane's logits [R, 1 + most drafts - first, V].
        """
        width = 1 + max(map(len, drafts)) - first
        tokens, starts = [], []
        for i in self.groups[g]:
            member = self.slots.members[i]
            for seat, draft in zip(seats, drafts):
                row = seat.row
                last = row.tokens[-1] if row.tokens else row.request.token_ids[member][-1]
                tokens.append(padded([last, *draft][first:], width))
                starts.append(len(seat.prompts[i]) + len(row.tokens) + first)
        shape = (len(self.groups[g]), len(seats), width)
        positions = torch.tensor(starts)[:, None] + torch.arange(width)
        slots = [seat.slot for seat in seats]
        return self.backbones[g].forward(
            torch.tensor(tokens).view(shape), positions.view(shape), slots, max(starts) + width
        )
