"""Rounds that the host reads at once, because it has to see each token or because there are drafts to verify.

Targets are settled up to the first that was not foretold, so a round without drafts settles one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genarm_fast.device.base import span
from genarm_fast.engine.scheduler import Seat
from genarm_fast.engine.sequence import Row
from genarm_fast.speculation.drafter import Drafts, no_drafts
from genarm_fast.speculation.observations import StepObservation

if TYPE_CHECKING:
    from genarm_fast.engine.engine import Engine


class HostRounds:
    """Such rounds of an engine, which has landed its flight before them."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def round(self, seats: Sequence[Seat], drafter: int | None, k: int) -> None:
        """Settle at least one token of every row on the host.

        It waits once, for drafts and targets together, and once more where a row's drafts were all right and the
        drafter has not seen the last one yet.
        """
        engine, rows = self.engine, [seat.row for seat in seats]
        start = engine.device.mark(engine.main)
        drafts = no_drafts(len(rows))
        most = [min(k, row.remaining - 1) for row in rows]
        if drafter is not None and max(most) > 0:
            with span("draft"):
                drafts = engine.drafters[drafter].propose(seats, most)
        logits = self.verify(seats, drafts)
        bonus = drafts.drafter is not None and not drafts.whole
        known = [each[:, : drafts.most] for each in logits] if bonus else logits
        lengths = [len(row.tokens) for row in rows]
        judge = engine.look(rows, known, drafter)
        accepted = self.settle(rows, known, drafts)
        verified = engine.device.mark(engine.main)
        judge([row.tokens[length:] for row, length in zip(rows, lengths)])
        if bonus:
            drafts.steps += self.settle_bonus(seats, logits, drafts, accepted)
        ended = engine.device.mark(engine.main)
        for seat, count, right in zip(seats, drafts.counts, accepted):
            seat.row.drafted += count
            seat.row.accepted += right
            if drafts.group is not None and drafts.group == engine.draft_model:
                seat.drafted = len(seat.row.tokens)
        drafting = engine.device.elapsed(*drafts.marks) if drafts.marks else 0.0
        verifying = engine.device.elapsed(start, verified) - drafting
        if drafts.drafter is not None:
            drafts.drafter.settled(drafts, accepted, drafting, verifying)
        drafting += engine.device.elapsed(verified, ended)
        seen = StepObservation(
            drafter, len(rows), max(most), drafts.counts, accepted, drafting, verifying, drafts.steps
        )
        engine.policy.observe(seen)

    def verify(self, seats: Sequence[Seat], drafts: Drafts) -> list[Tensor]:
        """Each member's logits after the last token and after every draft; of a drafting one, see `join`."""
        engine, forwards = self.engine, {}
        for g, backbone in enumerate(engine.backbones):
            if g not in (engine.draft_model, drafts.group):
                block = None
                if drafts.most:
                    (block,) = engine.device.hand_over([drafts.tensor], drafts.stream, backbone.stream)
                forwards[g] = engine.feed(g, seats, block)
        return engine.by_member(forwards, drafts.drafter.join(drafts) if drafts.drafter is not None else {})

    def settle(self, rows: Sequence[Row], logits: Sequence[Tensor], drafts: Drafts) -> list[int]:
        """Give rows their targets; how many drafts of each were right."""
        with span("sample"):
            draws = self.engine.sampler.draw(rows, logits, drafts)
        accepted = []
        with span("settle"):
            for row, own, tokens in zip(rows, draws, drafts.tokens):
                accepted.append(sum(draw.token == token for draw, token in zip(own, tokens)))
                for draw in own:
                    if row.finish_reason is None:
                        row.settle(draw)
        return accepted

    def settle_bonus(
        self, seats: Sequence[Seat], logits: Sequence[Tensor], drafts: Drafts, accepted: Sequence[int]
    ) -> bool:
        """One more token for rows whose every draft was right: only the drafter has not seen the last one yet.

        Whether there are any.
        """
        engine, most, group = self.engine, drafts.most, drafts.group
        assert group is not None
        index = [i for i, seat in enumerate(seats) if accepted[i] == most and not seat.row.ended]
        if index:
            again = [seats[i] for i in index]
            own = dict(zip(engine.groups[group], engine.collect(group, engine.feed(group, again))))
            where = engine.upload(torch.tensor(index))
            last = [own[i] if i in own else each[where, most:] for i, each in enumerate(logits)]
            self.settle([seat.row for seat in again], last, no_drafts(len(again)))
        return bool(index)
