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

    def summary(self) -> dict[str, Any]:
        """For JSON; costs are {tokens in the forward: seconds}."""
        return {
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance": [a / d if d else None for a, d in zip(self.accepted, self.drafted)],
            "draft_seconds": self.draft_costs.table(),
            "verify_seconds": self.verify_costs.table(),
        }
