"""Rounds whose costs and acceptance are known, for the controller to choose and to learn from."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from genarm_fast.speculation.estimates import expected_tokens
from genarm_fast.speculation.tuner import PLAIN, Choice, Controller

MAX_K = 8
SPIKE = 0.05  # share of forwards that something else on the machine holds up


@dataclass
class Draft:
    """cost: of a token, in units of a plain one-row forward. member: the target needs its forward too."""

    acceptance: float
    cost: float = 0.0
    active: float = 1.0
    member: bool = False


@dataclass
class World:
    """A forward of n tokens takes 1 + slope · (n - 1), times `rest` for all that is no drafter."""

    drafts: list[Draft]
    slope: float = 0.03
    rest: float = 1.0
    noise: float = 0.05
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def forward(self, tokens: float) -> float:
        return 1 + self.slope * (tokens - 1)

    def drafting(self, i: int, rows: int) -> float:
        return self.drafts[i].cost * self.forward(rows)

    def verifying(self, tokens: int, drafter: int | None = None) -> float:
        """All members' forwards, but for the drafter's."""
        members = (each.cost for j, each in enumerate(self.drafts) if each.member and j != drafter)
        return self.forward(tokens) * (self.rest + sum(members))

    def timed(self, seconds: float) -> float:
        spike = 4.0 if self.noise and self.random.random() < SPIKE else 1.0
        return seconds * spike * self.random.lognormvariate(0.0, self.noise)

    def plain(self, rows: int) -> float:
        return self.verifying(rows)

    def drafts_of(self, i: int, counts: list[int]) -> tuple[list[int], list[int]]:
        """Drafts proposed and accepted where so many are asked of each row."""
        draft = self.drafts[i]
        proposed = [count if self.random.random() < draft.active else 0 for count in counts]
        accepted = []
        for each in proposed:
            right = 0
            while right < each and self.random.random() < draft.acceptance:
                right += 1
            accepted.append(right)
        return proposed, accepted

    def round(self, controller: Controller, choice: Choice, rows: int) -> None:
        """One round, observed."""
        i, k = choice
        proposed, accepted = self.drafts_of(i or 0, [k] * rows) if self.drafts else ([0] * rows, [0] * rows)
        for j, draft in enumerate(self.drafts):
            if j != i and not draft.cost:
                controller.watch(j, *self.drafts_of(j, [1 + a for a in accepted]))
            elif j != i and draft.member and controller.curious():
                forward = self.timed(self.drafting(j, rows)) if i is None else None
                controller.watch(j, *self.drafts_of(j, [1] * rows), forward)
        if i is None:
            controller.observe(None, rows, 0, proposed, accepted, 0.0, self.timed(self.plain(rows)))
            return
        width = max(proposed)
        bonus = any(a == width for a in accepted)
        drafting = self.drafting(i, rows) * (width + bonus)
        verifying = self.verifying(rows * (1 + width), i)
        if not width:
            drafting, verifying = 0.0, self.plain(rows)
        controller.observe(i, rows, k, proposed, accepted, self.timed(drafting), self.timed(verifying))

    def gain(self, choice: Choice) -> float:
        """Expected tokens per row of a round."""
        i, k = choice
        if i is None:
            return 1.0
        draft = self.drafts[i]
        return 1 + draft.active * (expected_tokens([draft.acceptance] * k) - 1)

    def pace(self, choice: Choice, rows: int) -> float:
        """Expected seconds per token."""
        i, k = choice
        if i is None:
            return self.plain(rows)
        draft = self.drafts[i]
        idle = (1 - draft.active) ** rows
        full = draft.acceptance**k
        busy = self.drafting(i, rows) * (k + 1 - (1 - full) ** rows) + self.verifying(rows * (k + 1), i)
        return (idle * self.plain(rows) + (1 - idle) * busy) / self.gain(choice)

    def best(self, rows: int) -> Choice:
        choices = [PLAIN, *((i, k) for i in range(len(self.drafts)) for k in range(1, MAX_K + 1))]
        return min(choices, key=lambda choice: self.pace(choice, rows))


@dataclass
class Ahead(World):
    """The next block is there if all drafts of a round were right, and the guess of the token after them."""

    there: bool = False

    def round(self, controller: Controller, choice: Choice, rows: int) -> None:
        i, k = choice
        if i is None:
            return super().round(controller, choice, rows)
        accepted = self.drafts_of(i, [k + 1] * rows)[1]
        steps, self.there = 0 if self.there else k, min(accepted) > k
        drafting, verifying = steps * self.drafting(i, rows), self.verifying(rows * (k + 1), i)
        found = [min(each, k) for each in accepted]
        controller.observe(i, rows, k, [k] * rows, found, self.timed(drafting), self.timed(verifying), steps)

    def pace(self, choice: Choice, rows: int) -> float:
        i, k = choice
        if i is None:
            return super().pace(choice, rows)
        missing = k * (1 - self.drafts[i].acceptance ** ((k + 1) * rows))
        return (self.drafting(i, rows) * missing + self.verifying(rows * (k + 1), i)) / self.gain(choice)


def controller_for(world: World) -> Controller:
    return Controller([f"d{i}" for i in range(len(world.drafts))], MAX_K)


def simulate(world: World, controller: Controller, rows: int, rounds: int) -> float:
    """What the rounds' choices cost per token, relative to the best choice: 1.0 is perfect."""
    seconds = tokens = 0.0
    for _ in range(rounds):
        choice = controller.choose(rows)
        world.round(controller, choice, rows)
        tokens += world.gain(choice)
        seconds += world.gain(choice) * world.pace(choice, rows)
    return seconds / tokens / world.pace(world.best(rows), rows)
