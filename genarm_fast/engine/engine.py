"""The decode loop: prompts are prefilled in chunks, and running rows advance in rounds.

Between rounds every backbone has seen all but the last token of each running row. A round feeds that token and the
drafts that follow it, draws the target of each of these positions, and settles targets up to the first one that was
not foretold. Without drafts this is plain decoding. Drafts change how many rounds a text takes, never the text:
drafter and target draw a position with the same noise (docs/design.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from genarm_fast.engine.allocate import make_room
from genarm_fast.engine.flight import Flight
from genarm_fast.engine.host_rounds import HostRounds
from genarm_fast.engine.model_runner import in_one_forward, padded
from genarm_fast.engine.sampler import Sampler, adjusts
from genarm_fast.engine.scheduler import Seat, Slots
from genarm_fast.engine.sequence import Row
from genarm_fast.engine.workspace import Rooms
from genarm_fast.models.member import Member
from genarm_fast.speculation.config import Speculation
from genarm_fast.speculation.drafter import BackboneDrafter, NgramDrafter
from genarm_fast.speculation.observations import StepObservation
from genarm_fast.speculation.policy import DraftPolicy, Tuners


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
        tuners: Tuners,
        rooms: Rooms,
        draft_model: Member | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self.steered = steered
        arms = [
            i
            for i in range(len(members) - 1)
            if steered or any(row.weights[i] != 0 or row.request.params.rewards for row in rows)
        ]
        indices = [0, *(i + 1 for i in arms)]
        running = [members[i] for i in indices]
        self.groups = in_one_forward(running)  # of positions in `indices`
        self.draft_model = None if draft_model is None else len(self.groups)
        if draft_model is not None:  # sees the base's prompt
            self.groups.append([len(running)])
            running, indices = [*running, draft_model], [*indices, 0]
        prompts = [max(len(row.request.token_ids[i]) for i in indices) for row in rows]
        needs = [  # tokens; a row near its end may be padded as far as drafts go
            length + row.request.params.max_new_tokens + speculation.most for length, row in zip(prompts, rows)
        ]
        together = [[running[i] for i in group] for group in self.groups]
        self.rooms, self.room = rooms, make_room(together, rows, needs, slots, cache_bytes, rooms)
        self.device, self.backbones = self.room.device, self.room.backbones
        self.main = self.room.main  # samples and settles; each backbone has a stream of its own
        self.sampler = Sampler(running[: 1 + len(arms)], arms, vocab_size, self.device, self.main)
        self.refused = [row for row in rows if row.error is not None]
        fitting = [row for row in rows if row.error is None]
        self.slots = Slots(self.room.slots, fitting, indices)
        labels = ["base", *(f"arm[{i}]" for i in arms), "draft_model"]
        self.labels = ["+".join(labels[i] for i in group) + ".forward" for group in self.groups]
        self.flight, self.host_rounds = Flight(self, rows), HostRounds(self)
        self.spent: dict[int, tuple[Any, Any]] = {}  # marks around each backbone's latest forward
        self.drafters: list[BackboneDrafter | NgramDrafter] = [NgramDrafter(self)]
        if len(self.groups) > 1:
            own = [BackboneDrafter(self, g, [running[i].name for i in group]) for g, group in enumerate(self.groups)]
            self.drafters = [*own[1:], *self.drafters, own[0]]  # without a wish, an ARM comes before the base
        self.most = speculation.most
        names = [drafter.names for drafter in self.drafters]
        self.policy = DraftPolicy(speculation, names, tuners, ahead=self.device.lag > 0)

    @torch.inference_mode()
    def run(self) -> Iterator[list[Row]]:
        """Decode all rows, yielding after each round those that it advanced; before the first, those without room."""
        reusable = False
        try:
            if self.refused:
                yield self.refused
            while self.slots:
                self.slots.admit()
                self.prefill()
                if self.slots.running and (rows := self.device.launch(self.main, "round", self.round)):
                    yield rows
            reusable = True
        except GeneratorExit:
            reusable = True
            raise
        finally:
            self.device.finish()  # what is still running uses tensors that are about to be freed
            if reusable:
                self.rooms.leave(self.room)
            del self.room, self.backbones  # the engine itself may stay for a while

    def prefill(self) -> None:
        """One chunk; then seats whose prompts are complete join the running ones."""
        seats, width = self.slots.chunk()
        if seats:
            start = seats[0].done
            for group, backbone in zip(self.groups, self.backbones):
                tokens = [[padded(seat.prompts[i][start : start + width], width) for seat in seats] for i in group]
                positions = torch.arange(start, start + width).expand(len(group), len(seats), width)
                slots = [seat.slot for seat in seats]
                inputs = (torch.tensor(tokens), positions, slots, start + width)
                self.device.launch(backbone.stream, "prefill", backbone.prefill, *inputs)
            for seat in seats:
                seat.done = min(start + width, seat.needed)
        for donor, seat in self.slots.copies():
            for backbone in self.backbones:
                self.device.launch(backbone.stream, "prefill", backbone.copy, donor.slot, seat.slot, seat.common)
        self.slots.start()

    def round(self) -> list[Row]:
        """One more token at least for every running row. Returns the rows that the host has new tokens of."""
        start = time.perf_counter()
        seats = list(self.slots.running)
        drafter, k = self.policy.choose(len(seats))
        k = min(k, max(seat.row.remaining for seat in seats) - 1)
        if self.device.lag and not k and not self.steered and not any(adjusts(seat.row) for seat in seats):
            with self.watched(seats, None):
                advanced = self.flight.round(seats)
            if advanced:  # else it was the first, whose end nobody waited for
                nothing = [0] * len(advanced)
                seconds = time.perf_counter() - start
                self.policy.observe(StepObservation(None, len(advanced), 0, nothing, nothing, 0.0, seconds))
            self.advanced(advanced)
            return [seat.row for seat in advanced]
        landed = self.flight.land()
        self.advanced(landed)
        seats = list(self.slots.running)
        if seats:
            with self.watched(seats, drafter):
                self.host_rounds.round(seats, drafter, k)
            self.advanced(seats)
        return [seat.row for seat in dict.fromkeys([*landed, *seats])]

    @contextmanager
    def watched(self, seats: Sequence[Seat], drafter: int | None) -> Iterator[None]:
        """Judge drafters that cost nothing by the tokens settled inside, as if it was their turn."""
        drafters = {i: self.drafters[i] for i in self.policy.candidates if i != drafter}
        lengths = [len(seat.row.tokens) for seat in seats]
        most = [self.most] * len(seats)
        guesses = {i: each.guess(seats, most) for i, each in drafters.items() if isinstance(each, NgramDrafter)}
        yield
        for i, guess in guesses.items():
            self.policy.observe_shadow(i, guess, [seat.row.tokens[length:] for seat, length in zip(seats, lengths)])

    def look(
        self, rows: Sequence[Row], logits: Sequence[Tensor], drafter: int | None = None, positions: Tensor | None = None
    ) -> Callable[[Sequence[Sequence[int]]], None]:
        """Let members whose turn to draft it is not propose the next token from logits at hand.

        positions: [R, 1] of it in the response, where the host does not know them. Call the result with the tokens that
        were settled then.
        """
        looks = []
        for i in self.policy.shadow_due():
            each = self.drafters[i]
            if i != drafter and isinstance(each, BackboneDrafter) and each.group != self.draft_model:
                positions = self.sampler.positions(rows, 0, 1) if positions is None else positions
                looks.append((i, each.look(rows, logits, positions)))

        def judge(settled: Sequence[Sequence[int]]) -> None:
            for i, found in looks:
                guesses, seconds = found()
                # A forward that verified drafts took several tokens: its time tells nothing of drafting one.
                self.policy.observe_shadow(i, guesses, settled, seconds if drafter is None else None)

        return judge

    def advanced(self, seats: Sequence[Seat]) -> None:
        """Count a round, and free the slots of rows that ended in it."""
        now = time.perf_counter()
        for seat in seats:
            seat.row.finished = now
            seat.row.rounds += 1
        ended = [seat for seat in seats if seat.row.ended]
        for seat in ended:
            if seat.row.error is not None:
                for backbone in self.backbones:
                    self.device.launch(backbone.stream, "prefill", backbone.clear, seat.slot)
        self.slots.leave(ended)

    def feed(self, g: int, seats: Sequence[Seat], drafts: Tensor | None = None, first: int = 0) -> Sequence[Tensor]:
        """Launch backbone g on each seat's last token and its drafts [R, n]; if first > 0, on drafts from there on.

        They are on its stream, as the logits that it returns are. `collect` these before use on the main one.
        """
        group, backbone = self.groups[g], self.backbones[g]
        pieces = []
        if first == 0:
            last = [[[self.last_token(seat, i)] for seat in seats] for i in group]
            pieces.append(self.device.upload(torch.tensor(last), backbone.stream))
        if drafts is not None:
            pieces.append(drafts.expand(len(group), -1, -1))
        width = sum(piece.shape[-1] for piece in pieces)
        starts = [[len(seat.prompts[i]) + len(seat.row.tokens) + first for seat in seats] for i in group]
        positions = self.device.upload(torch.tensor(starts)[..., None] + torch.arange(width), backbone.stream)
        return self.launch(g, pieces, positions, [seat.slot for seat in seats], max(map(max, starts)) + width)

    def catch_up(self, seats: Sequence[Seat]) -> None:
        """Show the draft model what was settled in rounds in which it had no part, but for the last token."""
        g = self.draft_model
        assert g is not None
        (i,) = self.groups[g]
        for seat in seats:
            missing = [seat.row.request.token_ids[0][-1], *seat.row.tokens][seat.drafted : -1]
            if missing:
                start = len(seat.prompts[i]) + seat.drafted
                positions = torch.arange(start, start + len(missing)).view(1, 1, -1)
                inputs = (torch.tensor([[missing]]), positions, [seat.slot], start + len(missing))
                self.device.launch(self.backbones[g].stream, "prefill", self.backbones[g].prefill, *inputs)
                seat.drafted += len(missing)

    def last_token(self, seat: Seat, i: int) -> int:
        """As member i sees it; its prompt may end in another token than the base's."""
        return seat.row.tokens[-1] if seat.row.tokens else seat.row.request.token_ids[self.slots.members[i]][-1]

    def upload(self, tensor: Tensor) -> Tensor:
        return self.device.upload(tensor, self.main)

    def forward(self, g: int, tokens: Tensor, positions: Tensor, slots: Sequence[int], limit: int) -> Sequence[Tensor]:
        """Launch backbone g on tokens and positions [L, R, q] of the main stream. `collect` the logits before use."""
        tokens, positions = self.device.hand_over((tokens, positions), self.main, self.backbones[g].stream)
        return self.launch(g, [tokens], positions, slots, limit)

    def launch(
        self, g: int, tokens: Sequence[Tensor], positions: Tensor, slots: Sequence[int], limit: int
    ) -> Sequence[Tensor]:
        """The same on tensors of its own stream, the tokens in pieces."""
        backbone = self.backbones[g]

        def forward() -> Sequence[Tensor]:
            return backbone.forward(torch.cat([*tokens], dim=-1), positions, slots, limit)

        start = self.device.mark(backbone.stream) if self.policy.candidates else None
        logits = self.device.launch(backbone.stream, self.labels[g], forward)
        if start is not None:
            self.spent[g] = start, self.device.mark(backbone.stream)
        return logits

    def collect(self, g: int, logits: Sequence[Tensor]) -> list[Tensor]:
        """Logits of backbone g for use on the main stream."""
        return self.device.hand_over(logits, self.backbones[g].stream, self.main)

    def by_member(
        self, forwards: Mapping[int, Sequence[Tensor]], known: Mapping[int, Tensor] | None = None
    ) -> list[Tensor]:
        """Each member's logits from forwards by backbone, all launched by now; `known` ones are at hand, by member."""
        logits = dict(known or {})
        for g, lanes in forwards.items():
            logits |= zip(self.groups[g], self.collect(g, lanes))
        return [logits[i] for i in range(len(logits))]
