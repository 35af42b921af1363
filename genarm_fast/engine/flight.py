"""Plain rounds that need nothing from the host, which reads each one while the next is running.

What a round changes for the next stays on the device: its last tokens, lengths, and who has finished. That a row ended
is found out a round late; what was drawn for it meanwhile is dropped, and never shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from genarm_fast.device.base import span
from genarm_fast.engine.scheduler import Seat
from genarm_fast.engine.sequence import Row
from genarm_fast.kernels import GuidedSample, settle

if TYPE_CHECKING:
    from genarm_fast.engine.engine import Engine


class State(NamedTuple):
    """Rows by slot, int64 but for `finished`. Lengths and limits count tokens of the response."""

    last: Tensor  # [slots, members], at first the end of the prompt as each member sees it
    starts: Tensor  # [slots, members], the position of that
    lengths: Tensor  # [slots]
    limits: Tensor  # [slots]
    finished: Tensor  # bool [slots]
    stop_ids: Tensor  # [slots, S], padded with -1


class Round(NamedTuple):
    """Launched, and not looked at yet."""

    seats: list[Seat]
    read: Callable[[], GuidedSample]
    judge: Callable[[Sequence[Sequence[int]]], None]  # drafters, by what was settled


class Flight:
    """The running rows of an engine as the device knows them."""

    def __init__(self, engine: Engine, rows: Sequence[Row]) -> None:
        self.engine = engine
        self.stops = max(1, *(len(row.request.stop_ids) for row in rows))
        self.aboard: dict[int, Seat] = {}  # by slot, those whose state is on the device
        self.state: State | None = None
        self.pending: Round | None = None
        self._index: tuple[list[int], Tensor] = ([], torch.empty(0))

    def round(self, seats: Sequence[Seat]) -> list[Seat]:
        """Launch a round and settle the one before it, whose seats are returned."""
        before = self.pending
        going = [seat for seat in seats if self.drawn(seat) < seat.row.request.params.max_new_tokens]
        self.pending = self.launch(going) if going else None
        return self.settle(before)

    def land(self) -> list[Seat]:
        """Settle what was launched. Afterwards rows may be changed on the host."""
        before, self.pending = self.pending, None
        self.aboard.clear()
        return self.settle(before)

    def drawn(self, seat: Seat) -> int:
        """Tokens of its response, with one that was launched."""
        return len(seat.row.tokens) + (self.pending is not None and seat in self.pending.seats)

    def launch(self, seats: list[Seat]) -> Round:
        engine = self.engine
        self.board([seat for seat in seats if self.aboard.get(seat.slot) is not seat])
        slots = [seat.slot for seat in seats]
        if slots != self._index[0]:
            self._index = slots, engine.upload(torch.tensor(slots))
        index = self._index[1]
        lengths, inputs = self.inputs(index)
        forwards = {}
        for g, (tokens, positions) in inputs.items():
            longest = max(len(seat.prompts[i]) + self.drawn(seat) for seat in seats for i in engine.groups[g])
            forwards[g] = engine.forward(g, tokens, positions, slots, longest + 1)
        logits = engine.by_member(forwards)
        with span("sample"):
            result = engine.sampler.sample([seat.row for seat in seats], logits, lengths[:, None])
        with span("settle"):
            self.advance(index, result.tokens)
        judge = engine.look([seat.row for seat in seats], logits, positions=lengths[:, None])
        return Round(seats, engine.sampler.read(result), judge)

    def inputs(self, index: Tensor) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """Lengths [R], and each backbone's tokens and positions [L, R, 1]."""
        assert self.state is not None
        lengths = self.state.lengths[index]
        tokens = self.state.last[index].unbind(1)
        positions = (self.state.starts[index] + lengths[:, None]).unbind(1)
        lanes = {g: group for g, group in enumerate(self.engine.groups) if g != self.engine.draft_model}
        return lengths, {
            g: (
                torch.stack([tokens[i] for i in group])[..., None],
                torch.stack([positions[i] for i in group])[..., None],
            )
            for g, group in lanes.items()
        }

    def advance(self, index: Tensor, targets: Tensor) -> None:
        """Targets [R, 1] → the next round's state."""
        state = self.state
        assert state is not None
        settled = settle(
            targets,
            targets[:, :0],
            lengths=state.lengths[index],
            limits=state.limits[index],
            finished=state.finished[index],
            stop_ids=state.stop_ids[index],
        )
        state.lengths.index_copy_(0, index, settled.lengths)
        state.finished.index_copy_(0, index, settled.finished)
        state.last.index_copy_(0, index, settled.next_tokens[:, None].expand(-1, state.last.shape[1]))

    def board(self, seats: Sequence[Seat]) -> None:
        """Tell the device of rows that are new, or were changed on the host."""
        if not seats:
            return
        members = range(len(seats[0].prompts))
        rows = [seat.row for seat in seats]
        stops = [sorted(row.request.stop_ids) for row in rows]
        fields = State(
            last=torch.tensor([[self.engine.last_token(seat, i) for i in members] for seat in seats]),
            starts=torch.tensor([list(map(len, seat.prompts)) for seat in seats]),
            lengths=torch.tensor([len(row.tokens) for row in rows]),
            limits=torch.tensor([row.request.params.max_new_tokens for row in rows]),
            finished=torch.tensor([row.ended for row in rows]),
            stop_ids=torch.tensor([each + [-1] * (self.stops - len(each)) for each in stops]),
        )
        if self.state is None:
            slots = len(self.engine.slots.last)
            shapes = ((field.new_zeros(slots, *field.shape[1:])) for field in fields)
            self.state = State(*map(self.engine.upload, shapes))
        index = self.engine.upload(torch.tensor([seat.slot for seat in seats]))
        for own, field in zip(self.state, fields):
            own.index_copy_(0, index, self.engine.upload(field))
        self.aboard |= {seat.slot: seat for seat in seats}

    def settle(self, launched: Round | None) -> list[Seat]:
        """Wait for a round and give its rows their tokens. Those that had ended before are left out."""
        if launched is None:
            return []
        result = launched.read()
        alive = [not seat.row.ended for seat in launched.seats]
        rows = [seat.row for seat in launched.seats]
        lines = self.engine.sampler.lines(rows, result, [()] * len(rows))
        for row, draws in zip(rows, lines):
            for draw in draws:
                row.settle(draw)
        launched.judge([[draw.token for draw in draws] for draws in lines])
        return [seat for seat, was in zip(launched.seats, alive) if was]
