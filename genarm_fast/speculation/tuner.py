"""The tuner: it chooses the drafter and K with most tokens per second, by measured times and acceptance of drafts.

Plain decoding is one of the choices. Most measurements cost nothing: shadow evaluation compares the tokens of a step
with those that drafters would have proposed, and plain steps run every member's forward anyway. Other choices are tried
now and then, within a small budget of time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from genarm_fast.speculation.config import DEFAULT_TUNER_CONFIG, TunerConfig
from genarm_fast.speculation.drafter_stats import DrafterStats
from genarm_fast.speculation.estimates import ForwardCosts
from genarm_fast.speculation.observations import PLAIN, Choice, ShadowObservation, StepObservation


class Tuner:
    """Chooses a drafter and K before each step and learns from the step. One tuner sees all steps of a model.

    Args:
        drafters: the names of the drafters. A drafter may be a member, which then does not verify its own drafts.
        max_k: most drafts in a step.
        ahead: whether the next block is drafted while one is verified.
        config: the numbers by which it decides.

    Raises:
        ValueError: if max_k is less than 1.
    """

    def __init__(
        self, drafters: Sequence[str], max_k: int, *, ahead: bool = False, config: TunerConfig = DEFAULT_TUNER_CONFIG
    ) -> None:
        if max_k < 1:
            raise ValueError(f"max_k={max_k}: expected an integer >= 1")
        self.config, self.ahead = config, ahead
        self.drafters = [DrafterStats(name, max_k, config) for name in drafters]
        self.plain_costs = ForwardCosts(config)  # seconds of a step of plain decoding, over rows
        self.now = 0  # number of the current step
        self.budget = 0.0  # seconds that trials may lose
        self.best = PLAIN  # the choice that is fastest as far as is known
        self.trial: Choice | None = None  # the choice that this step tries instead of the best one
        self.last_steps: dict[Choice, int] = {}  # number of the latest step of each choice
        self.learns_costs_only = False  # True while a model is warmed up: then only times of steps are learnt
        self._warm_up_steps: Counter[tuple[int, Choice]] = Counter()  # steps of a warm-up, by rows and choice
        self._plain_steps = 0  # steps of plain decoding, those of a warm-up included
        self.steps: Counter[Choice] = Counter()
        self._best_seconds = 0.0  # seconds per token of the best choice
        self._rows = 0  # rows of the current step

    def choose(self, rows: int) -> Choice:
        """Return the choice for the next step, which has `rows` sequences."""
        if self.learns_costs_only:
            return self._next_warm_up_choice(rows)
        self.now += 1
        same_rows, self._rows = rows == self._rows, rows
        again, self.trial = self.trial if same_rows else None, None
        if not self.drafters or self.timing_due() or not self.plain_costs.near(rows):
            return PLAIN
        if same_rows and again is None and self._plain_steps > 2 and self.now % self.config.update_interval:
            return self.best
        seconds = {PLAIN: self.plain_costs.at(rows)}  # seconds per token of each choice
        for i, drafter in enumerate(self.drafters):
            if drafter.steps < 2 and not drafter.shadow_steps:
                return Choice(i, 1)
            expected = drafter.seconds_per_token(rows, self.plain_costs, self.ahead)
            seconds |= {Choice(i, k): each for k, each in enumerate(expected, 1)}
        self._update_best(seconds)
        self._best_seconds = seconds[self.best]
        self.trial = again if again in seconds and again != self.best else self._next_trial(seconds)
        return self.trial or self.best

    def shadow_due(self) -> bool:
        """Whether this step should draw shadow drafts of members."""
        return self.now % self.config.shadow_interval == 0 or self.timing_due()

    def timing_due(self) -> bool:
        """Whether shadow evaluation has to time a draft, which is impossible in a step that is one launch."""
        return self._plain_steps < 2

    def observe(self, step: StepObservation) -> None:
        """Learn from a step."""
        choice = Choice(step.drafter, step.k)
        drafter = None if step.drafter is None else self.drafters[step.drafter]
        self._observe_costs(step, drafter)
        self._plain_steps += choice == PLAIN
        if self.learns_costs_only:
            return
        seconds = step.seconds
        self.steps[choice] += 1
        self.last_steps[choice] = self.now
        if drafter is not None and step.proposed:
            drafter.steps += 1
            drafter.observe(step.proposed, step.accepted, self.now)
        tokens = 1 + sum(step.accepted) / step.rows
        plain = self.plain_costs.at(step.rows) if self.plain_costs.points else seconds
        saved = max(tokens * plain - seconds, 0.0)
        self.budget += self.config.exploration * seconds + self.config.exploration_of_savings * saved
        if self.trial is not None:
            lost = min(seconds - tokens * self._best_seconds, plain)  # a larger loss is a delay by the machine
            self.budget -= lost
            if drafter is not None:
                longer = min(2 * drafter.retry_steps, self.config.max_retry_steps)
                drafter.retry_steps = longer if lost > 0 else self.config.retry_steps
            if lost > 0:  # a trial that gains is repeated in the next step
                self.trial = None

    def _observe_costs(self, step: StepObservation, drafter: DrafterStats | None) -> None:
        """Learn from a step's times."""
        width = max(step.proposed, default=0)
        if drafter is not None and step.draft_seconds is None:
            drafter.observe_one_launch(step.rows, step.k, step.seconds)
        elif drafter is None or width == 0:
            self.plain_costs.add(step.rows, step.seconds)
        else:
            forwards = step.drafter_steps
            if forwards is None:
                forwards = width + any(a == width for a in step.accepted)
            if forwards and step.draft_seconds is not None:  # with 0 forwards, all drafts were drawn ahead
                drafter.draft_costs.add(step.rows, step.draft_seconds / forwards)
            drafter.verify_costs.add(step.rows * (1 + width), step.verify_seconds)

    def observe_shadow(self, shadow: ShadowObservation) -> None:
        """Learn from drafts that were judged but not used, in a step in which the drafter did not draft.

        Drafts of n-grams cost nothing. A member's first draft costs a draw alone, since the step has its logits.
        """
        if not shadow.proposed:
            return
        drafter = self.drafters[shadow.drafter]
        if not self.learns_costs_only:
            drafter.shadow_steps += 1
            drafter.observe(shadow.proposed, shadow.accepted, self.now)
        if shadow.seconds is not None:
            drafter.draft_costs.add(len(shadow.proposed), shadow.seconds)

    def stats(self) -> dict[str, Any]:
        """Return all measurements and choices so far, for JSON. Costs are {tokens in the forward: seconds}."""
        return {
            "steps": {
                "plain" if i is None else f"{self.drafters[i].name}, k={k}": count
                for (i, k), count in sorted(self.steps.items(), key=lambda item: (item[0][0] is not None, item[0]))
            },
            "plain_seconds": self.plain_costs.table(),
            "drafters": {drafter.name: drafter.summary() for drafter in self.drafters},
        }

    def _next_warm_up_choice(self, rows: int) -> Choice:
        """Return the next choice to time in a warm-up with this many sequences, each for two steps.

        Plain decoding comes first, then each drafter with the numbers of drafts in `warm_drafts`.
        """
        most = max((len(drafter.rates) for drafter in self.drafters), default=0)
        kinds = [PLAIN, *(Choice(i, min(k, most)) for i in range(len(self.drafters)) for k in self.config.warm_drafts)]
        choice = next((each for each in kinds if self._warm_up_steps[rows, each] < 2), PLAIN)
        self._warm_up_steps[rows, choice] += 1
        return choice

    def _update_best(self, seconds: dict[Choice, float]) -> None:
        """Change the best choice if another one needs clearly less time per token."""
        fastest = min(seconds, key=seconds.__getitem__)
        margin = self.config.leave_plain_margin if self.best == PLAIN else self.config.switch_margin
        if self.best not in seconds or fastest == PLAIN or seconds[fastest] < margin * seconds[self.best]:
            self.best = fastest

    def _next_trial(self, seconds: dict[Choice, float]) -> Choice | None:
        """Return a choice to try instead of the best one, if one is due and the budget allows it."""
        best_drafter, k = self.best
        near = (PLAIN, Choice(best_drafter, k - 1), Choice(best_drafter, k + 1))
        due = {
            choice: self.last_steps.get(choice, 0) + self.config.retry_steps
            for choice in near
            if choice in seconds and choice != self.best
        }
        for i, drafter in enumerate(self.drafters):
            if i != best_drafter:
                own = [choice for choice in seconds if choice.drafter == i]
                bound = 1.2 * min(seconds[choice] for choice in own)
                # Of the drafter's choices within 20 % of its fastest, the one with most drafts shows most.
                longest = max(choice for choice in own if seconds[choice] <= bound)
                own_steps = (step for choice, step in self.last_steps.items() if choice.drafter == i)
                due[longest] = max(own_steps, default=-drafter.retry_steps) + drafter.retry_steps
        for choice, step in sorted(due.items(), key=lambda item: item[1]):
            if self.now >= step and seconds[choice] - self._best_seconds <= self.budget:
                return choice
        return None
