"""Simulated steps with known costs and acceptance, which a tuner chooses among and learns from."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from genarm_fast.speculation.config import DEFAULT_TUNER_CONFIG, TunerConfig
from genarm_fast.speculation.estimates import expected_tokens
from genarm_fast.speculation.observations import PLAIN, Choice, ShadowObservation, StepObservation
from genarm_fast.speculation.tuner import Tuner

MAX_K = 8
SPIKE = 0.05  # share of forwards that other work on the machine delays


@dataclass
class Draft:
    """A drafter.

    acceptance: probability that a draft is accepted. cost: cost of one drafted token, in units of a plain one-row
    forward. active: probability that a row gets drafts. member: whether the target needs this model's forward too.
    """

    acceptance: float
    cost: float = 0.0
    active: float = 1.0
    member: bool = False


@dataclass
class World:
    """A simulated model. A forward of n tokens takes 1 + slope · (n - 1); `rest` scales this for the members that draft
    nothing."""

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
        """Return the cost of all members' forwards except the drafter's."""
        members = (each.cost for j, each in enumerate(self.drafts) if each.member and j != drafter)
        return self.forward(tokens) * (self.rest + sum(members))

    def timed(self, seconds: float) -> float:
        spike = 4.0 if self.noise and self.random.random() < SPIKE else 1.0
        return seconds * spike * self.random.lognormvariate(0.0, self.noise)

    def plain(self, rows: int) -> float:
        return self.verifying(rows)

    def drafts_of(self, i: int, counts: list[int]) -> tuple[list[int], list[int]]:
        """Return the numbers of drafts proposed and accepted per row when `counts` drafts are asked of the rows."""
        draft = self.drafts[i]
        proposed = [count if self.random.random() < draft.active else 0 for count in counts]
        accepted = []
        for each in proposed:
            right = 0
            while right < each and self.random.random() < draft.acceptance:
                right += 1
            accepted.append(right)
        return proposed, accepted

    def step(self, tuner: Tuner, choice: Choice, rows: int) -> None:
        """Run one step and let the tuner observe it."""
        i, k = choice
        proposed, accepted = self.drafts_of(i or 0, [k] * rows) if self.drafts else ([0] * rows, [0] * rows)
        for j, draft in enumerate(self.drafts):
            if j != i and not draft.cost:
                tuner.observe_shadow(ShadowObservation(j, *self.drafts_of(j, [1 + a for a in accepted])))
            elif j != i and draft.member and tuner.shadow_due():
                forward = self.timed(self.drafting(j, rows)) if i is None else None
                tuner.observe_shadow(ShadowObservation(j, *self.drafts_of(j, [1] * rows), forward))
        if i is None:
            seconds = self.timed(self.plain(rows))
            tuner.observe(StepObservation(None, rows, 0, proposed, accepted, 0.0, seconds))
            return
        width = max(proposed)
        bonus = any(a == width for a in accepted)
        drafting = self.drafting(i, rows) * (width + bonus)
        verifying = self.verifying(rows * (1 + width), i)
        if not width:
            drafting, verifying = 0.0, self.plain(rows)
        seconds = self.timed(drafting), self.timed(verifying)
        tuner.observe(StepObservation(i, rows, k, proposed, accepted, *seconds))

    def gain(self, choice: Choice) -> float:
        """Return the expected number of tokens per row of a step."""
        i, k = choice
        if i is None:
            return 1.0
        draft = self.drafts[i]
        return 1 + draft.active * (expected_tokens([draft.acceptance] * k) - 1)

    def seconds_per_token(self, choice: Choice, rows: int) -> float:
        """Return the expected seconds per token."""
        i, k = choice
        if i is None:
            return self.plain(rows)
        draft = self.drafts[i]
        idle = (1 - draft.active) ** rows
        full = draft.acceptance**k
        busy = self.drafting(i, rows) * (k + 1 - (1 - full) ** rows) + self.verifying(rows * (k + 1), i)
        return (idle * self.plain(rows) + (1 - idle) * busy) / self.gain(choice)

    def best(self, rows: int) -> Choice:
        choices = [PLAIN, *(Choice(i, k) for i in range(len(self.drafts)) for k in range(1, MAX_K + 1))]
        return min(choices, key=lambda choice: self.seconds_per_token(choice, rows))


@dataclass
class Ahead(World):
    """A world that drafts ahead. The next block exists already if all drafts of a step were right, and so was the token
    guessed after them."""

    there: bool = False

    def step(self, tuner: Tuner, choice: Choice, rows: int) -> None:
        i, k = choice
        if i is None:
            return super().step(tuner, choice, rows)
        accepted = self.drafts_of(i, [k + 1] * rows)[1]
        steps, self.there = 0 if self.there else k, min(accepted) > k
        drafting, verifying = steps * self.drafting(i, rows), self.verifying(rows * (k + 1), i)
        found = [min(each, k) for each in accepted]
        seconds = self.timed(drafting), self.timed(verifying)
        tuner.observe(StepObservation(i, rows, k, [k] * rows, found, *seconds, steps))

    def seconds_per_token(self, choice: Choice, rows: int) -> float:
        i, k = choice
        if i is None:
            return super().seconds_per_token(choice, rows)
        missing = k * (1 - self.drafts[i].acceptance ** ((k + 1) * rows))
        return (self.drafting(i, rows) * missing + self.verifying(rows * (k + 1), i)) / self.gain(choice)


@dataclass
class Whole(World):
    """A world whose steps are one launch: every row has k drafts, found or not, and the parts of a step have no
    times."""

    def step(self, tuner: Tuner, choice: Choice, rows: int) -> None:
        i, k = choice
        if i is None:
            return super().step(tuner, choice, rows)
        proposed, accepted = self.drafts_of(i, [k] * rows)
        seconds = self.timed(self.launched(choice, rows))
        tuner.observe(StepObservation(i, rows, k, proposed, accepted, None, seconds))

    def launched(self, choice: Choice, rows: int) -> float:
        assert choice.drafter is not None
        return choice.k * self.drafting(choice.drafter, rows) + self.verifying(rows * (choice.k + 1), choice.drafter)

    def seconds_per_token(self, choice: Choice, rows: int) -> float:
        return (self.plain(rows) if choice.drafter is None else self.launched(choice, rows)) / self.gain(choice)


def tuner_for(world: World, config: TunerConfig = DEFAULT_TUNER_CONFIG) -> Tuner:
    return Tuner([f"d{i}" for i in range(len(world.drafts))], MAX_K, config=config)


def simulate(world: World, tuner: Tuner, rows: int, steps: int) -> float:
    """Return the seconds per token of the tuner's choices, relative to the best choice: 1.0 is perfect."""
    seconds = tokens = 0.0
    for _ in range(steps):
        choice = tuner.choose(rows)
        world.step(tuner, choice, rows)
        tokens += world.gain(choice)
        seconds += world.gain(choice) * world.seconds_per_token(choice, rows)
    return seconds / tokens / world.seconds_per_token(world.best(rows), rows)
