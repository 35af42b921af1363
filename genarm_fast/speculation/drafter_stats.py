"""What is known of one drafter, and how fast decoding with its drafts would be."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import Any

from genarm_fast.speculation.config import TunerConfig
from genarm_fast.speculation.estimates import DriftingRate, ForwardCosts


class DrafterStats:
    """Costs and acceptance of one drafter, as measured so far."""

    def __init__(self, name: str, max_k: int, config: TunerConfig) -> None:
        self.name, self.config = name, config
        self.draft_costs = ForwardCosts(config)  # of one draft, over rows
        self.verify_costs = ForwardCosts(config)  # of everything else, over rows · (K + 1) tokens
        self.whole_costs: dict[int, ForwardCosts] = {}  # by rows: of steps that were one launch, over K + 1 tokens
        self.activity = DriftingRate(config)  # share of rows for which it proposes anything
        self.rates = [DriftingRate(config) for _ in range(max_k)]  # draft j is right, if all before it are
        self.steps = 0  # in which it drafted
        self.shadow_steps = 0  # in which it was evaluated without drafting
        self.retry_steps = config.retry_steps  # before it is tried again
        self.drafted = [0] * max_k  # drafts at each position after right ones, and how many of them were right
        self.accepted = [0] * max_k

    def observe(self, proposed: Sequence[int], accepted: Sequence[int], now: int) -> None:
        """Learn from how many drafts each row had and how many were right, in step number `now`."""
        jumped = self.activity.add(sum(map(bool, proposed)), len(proposed), now)
        for j in range(min(max(proposed), len(self.rates))):
            trials = sum(p > j and a >= j for p, a in zip(proposed, accepted))
            hits = sum(a > j for a in accepted)
            jumped |= self.rates[j].add(hits, trials, now)
            self.drafted[j] += trials
            self.accepted[j] += hits
        if jumped:
            self.retry_steps = self.config.retry_steps

    def observe_whole(self, rows: int, k: int, seconds: float) -> None:
        """Learn from a step of so many rows that was one launch, with k drafts for each of them."""
        self.whole_costs.setdefault(rows, ForwardCosts(self.config)).add(1 + k, seconds)

    def acceptance(self) -> list[float]:
        """The chance that draft 1, 2, ... is right if those before it are; an unknown one is as good as the last."""
        found, last = [], 0.7
        for rate in self.rates:
            last = rate.value(last)
            found.append(last)
        return found

    def seconds_per_token(self, rows: int, plain_costs: ForwardCosts, ahead: bool) -> list[float]:
        """Expected seconds per token and row with 1, 2, ... drafts, up to twice the tokens that were measured.

        Args:
            rows: of the step.
            plain_costs: of plain decoding, over rows; it has been measured.
            ahead: whether the next block is drafted while one is verified.
        """
        if self.whole_costs:
            return self._of_whole_steps(rows, plain_costs)
        plain = plain_costs.at(rows)
        draft, largest = 0.0, float(rows)
        if self.draft_costs.points:  # else it had nothing to propose yet
            measured, draft = min(self.draft_costs.points, key=lambda point: abs(log2(point[0] / rows)))
            draft *= plain / plain_costs.at(measured)
        if self.verify_costs.points:
            largest = max(largest, self.verify_costs.points[-1][0])
        known = (float(rows), max(plain - draft, plain / 4))  # a member does not verify its own drafts
        active = self.activity.value(1.0)
        idle = (1 - active) ** rows  # chance that nothing is proposed to any row
        expected: list[float] = []
        all_right = gain = 1.0
        rates = self.acceptance()
        for k, acceptance in enumerate(rates, 1):
            tokens = rows * (k + 1)
            if tokens > 2.1 * largest:
                break
            all_right *= acceptance
            gain += active * all_right
            forwards = k * (1 - (all_right * rates[0]) ** rows) if ahead else k + 1 - (1 - all_right) ** rows
            verify = min(self.verify_costs.at(tokens, known), (k + 1) * known[1])  # more was held up
            if not self.verify_costs.near(tokens) and plain_costs.near(tokens):  # as so many rows
                verify = max(plain_costs.at(tokens) * (1 - draft / plain), known[1])
            expected.append((idle * plain + (1 - idle) * (draft * forwards + verify)) / gain)
        return expected

    def _of_whole_steps(self, rows: int, plain_costs: ForwardCosts) -> list[float]:
        """The same from steps that were one launch: what their parts take need not be known.

        Such a step costs the same whatever it drafts. Without drafts it is one of plain decoding, and more drafts than
        were measured go on along the line from there: one through two noisy neighbours could point anywhere. Steps of
        other rows are taken to cost in proportion to these.
        """
        measured = min(self.whole_costs, key=lambda each: abs(log2(each / rows)))
        costs, plain = self.whole_costs[measured], plain_costs.at(measured)
        factor, active = plain_costs.at(rows) / plain, self.activity.value(1.0)
        most, longest = costs.points[-1]
        slope = max(longest - plain, 0.0) / (most - 1)
        expected: list[float] = []
        all_right = gain = 1.0
        for k, acceptance in enumerate(self.acceptance(), 1):
            if 1 + k > 2.1 * most:
                break
            all_right *= acceptance
            gain += active * all_right
            seconds = costs.at(1 + k, (1.0, plain)) if 1 + k <= most else longest + slope * (1 + k - most)
            expected.append(factor * seconds / gain)
        return expected

    def summary(self) -> dict[str, Any]:
        """For JSON; costs are {tokens in the forward: seconds}."""
        return {
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance": [a / d if d else None for a, d in zip(self.accepted, self.drafted)],
            "draft_seconds": self.draft_costs.table(),
            "verify_seconds": self.verify_costs.table(),
            "whole_seconds": {rows: costs.table() for rows, costs in self.whole_costs.items()},
        }
