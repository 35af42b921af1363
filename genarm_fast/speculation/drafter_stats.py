"""Statistics of one drafter, and predictions of how fast decoding with its drafts would be."""

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
        self.draft_costs = ForwardCosts(config)  # seconds of one draft, over the number of rows
        self.verify_costs = ForwardCosts(config)  # seconds of the rest of a step, over rows · (K + 1) tokens
        self.one_launch_costs: dict[int, ForwardCosts] = {}  # seconds of steps that are one launch, over K + 1, by rows
        self.activity = DriftingRate(config)  # share of rows for which it proposes anything
        self.rates = [DriftingRate(config) for _ in range(max_k)]  # how often draft j is right if all before it are
        self.steps = 0  # steps in which it drafted
        self.shadow_steps = 0  # steps in which it was evaluated without drafting
        self.retry_steps = config.retry_steps  # steps before it is tried again
        self.drafted = [0] * max_k  # drafts at each position after right ones; `accepted` counts the right ones of them
        self.accepted = [0] * max_k

    def observe(self, proposed: Sequence[int], accepted: Sequence[int], now: int) -> None:
        """Learn from each row's number of drafts, and how many of them were right, in step number `now`."""
        jumped = self.activity.add(sum(map(bool, proposed)), len(proposed), now)
        for j in range(min(max(proposed), len(self.rates))):
            trials = sum(p > j and a >= j for p, a in zip(proposed, accepted))
            hits = sum(a > j for a in accepted)
            jumped |= self.rates[j].add(hits, trials, now)
            self.drafted[j] += trials
            self.accepted[j] += hits
        if jumped:
            self.retry_steps = self.config.retry_steps

    def observe_one_launch(self, rows: int, k: int, seconds: float) -> None:
        """Learn from a step that was one launch, with k drafts for each row."""
        self.one_launch_costs.setdefault(rows, ForwardCosts(self.config)).add(1 + k, seconds)

    def acceptance(self) -> list[float]:
        """Return the chances that draft 1, 2, ... is right if all before it are. Unknown ones equal the one before."""
        found, last = [], 0.7
        for rate in self.rates:
            last = rate.value(last)
            found.append(last)
        return found

    def seconds_per_token(self, rows: int, plain_costs: ForwardCosts, ahead: bool) -> list[float]:
        """Return the expected seconds per token and row with 1, 2, ... drafts.

        The list ends at about twice the largest number of tokens that was measured.

        Args:
            rows: rows of the step.
            plain_costs: seconds of plain decoding over rows, measured for one size at least.
            ahead: whether the next block is drafted while one is verified.
        """
        if self.one_launch_costs:
            return self._seconds_by_one_launch(rows, plain_costs)
        plain = plain_costs.at(rows)
        draft, largest = 0.0, float(rows)
        if self.draft_costs.points:  # empty if it has proposed nothing yet
            measured, draft = min(self.draft_costs.points, key=lambda point: abs(log2(point[0] / rows)))
            draft *= plain / plain_costs.at(measured)
        if self.verify_costs.points:
            largest = max(largest, self.verify_costs.points[-1][0])
        # A forward of the others over one token: that of all members without the drafter, which does not verify.
        known = (float(rows), max(plain - draft, plain / 4))
        active = self.activity.value(1.0)
        idle = (1 - active) ** rows  # chance that no row gets a draft
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
            # More than k + 1 times one token's time can only be a delay by other work on the machine.
            verify = min(self.verify_costs.at(tokens, known), (k + 1) * known[1])
            # Without a measurement, plain decoding of as many rows as there are tokens is the closest one.
            if not self.verify_costs.near(tokens) and plain_costs.near(tokens):
                verify = max(plain_costs.at(tokens) * (1 - draft / plain), known[1])
            expected.append((idle * plain + (1 - idle) * (draft * forwards + verify)) / gain)
        return expected

    def _seconds_by_one_launch(self, rows: int, plain_costs: ForwardCosts) -> list[float]:
        """Return the same as `seconds_per_token`, from timings of steps that were one launch.

        Such a step costs the same whether its drafts are right or not. Its cost without drafts is that of plain
        decoding. Costs of more drafts than were measured follow the line from there to the largest measured number; a
        line through two noisy neighbours could point anywhere. Costs for another number of rows are in proportion.
        """
        measured = min(self.one_launch_costs, key=lambda each: abs(log2(each / rows)))
        costs, plain = self.one_launch_costs[measured], plain_costs.at(measured)
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
        """Return the statistics for JSON. Costs are {tokens in the forward: seconds}."""
        return {
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance": [a / d if d else None for a, d in zip(self.accepted, self.drafted)],
            "draft_seconds": self.draft_costs.table(),
            "verify_seconds": self.verify_costs.table(),
            "whole_seconds": {rows: costs.table() for rows, costs in self.one_launch_costs.items()},
        }
