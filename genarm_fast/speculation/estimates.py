"""Estimates of what steps cost and yield, from noisy measurements, and the speed that follows from them."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from math import log2

from genarm_fast.speculation.config import TunerConfig


def expected_tokens(acceptance: Sequence[float]) -> float:
    """Return the expected tokens of a step, 1 + a₁ + a₁a₂ + ...

    acceptance: the chances aⱼ that draft j is right if all before it are.
    """
    total = all_right = 1.0
    for each in acceptance:
        all_right *= each
        total += all_right
    return total


def expected_speedup(cost: float, acceptance: float, k: int, *, verify: float = 1.0) -> float:
    """Return the speed of steps with k drafts by an ARM relative to plain decoding, for one row (docs/speculation.md).

    S = (1 + c) E / (c (k + a^k) + v), E = 1 + a + ... + a^k. If all k drafts are right, the ARM runs once more on the
    last draft. So the token after it is generated in the same step.

    Args:
        cost: c, the time of an ARM forward, divided by that of the other members' forward.
        acceptance: a, the chance that a draft is right if all before it are.
        verify: v, the time of the other members' forward of k + 1 tokens, divided by that of a single token.
    """
    return (1 + cost) * expected_tokens([acceptance] * k) / (cost * (k + acceptance**k if k else 1.0) + verify)


def best_k(cost: float, acceptance: float, max_k: int) -> int:
    """Return the k from 0 to max_k with the largest `expected_speedup`."""
    return max(range(max_k + 1), key=lambda k: expected_speedup(cost, acceptance, k))


class ForwardCosts:
    """Seconds of a forward as a function of its number of tokens: lower quartiles of the latest timings.

    Sizes within 12 % of each other, a sixth of an octave, count as one size.
    """

    def __init__(self, config: TunerConfig) -> None:
        self.config = config
        self.timings: dict[int, deque[float]] = {}  # seconds, by 6 · log2(tokens) rounded
        self.points: list[tuple[float, float]] = []  # (tokens, seconds), in the order of tokens

    def add(self, tokens: float, seconds: float) -> None:
        """Learn from one forward."""
        self.timings.setdefault(round(6 * log2(tokens)), deque(maxlen=self.config.timings)).append(max(seconds, 1e-9))
        sizes = sorted(self.timings)
        # Other work on the machine only ever adds to a time. So a size with fewer than three timings was delayed if it
        # took more than a larger size, or more per token than a smaller one.
        found = {size: sorted(self.timings[size])[(len(self.timings[size]) - 1) // 4] for size in sizes}
        for small, large in reversed([*pairwise(sizes)]):
            if len(self.timings[small]) < 3:
                found[small] = min(found[small], found[large])
        for small, large in pairwise(sizes):
            if len(self.timings[large]) < 3:
                found[large] = min(found[large], found[small] * 2 ** ((large - small) / 6))
        self.points = [(2 ** (size / 6), found[size]) for size in sizes]

    def at(self, tokens: float, known: tuple[float, float] | None = None) -> float:
        """Return the seconds of a forward of this many tokens, interpolated, or extrapolated from the last two sizes.

        With a single size, the cost of n tokens is in proportion to `free_tokens` + n. At least one size has to be
        measured or `known`.

        known: (tokens, seconds) of a forward that is smaller than all measured ones.
        """
        points = self.points
        if known is not None and (not points or known[0] < 0.9 * points[0][0]):
            points = [known, *points]
        i = bisect_left(points, (tokens, 0.0))
        if i == 0:
            return points[0][1]
        if len(points) == 1:
            return points[0][1] * (self.config.free_tokens + tokens) / (self.config.free_tokens + points[0][0])
        (x0, y0), (x1, y1) = points[min(i, len(points) - 1) - 1 :][:2]
        slope = (y1 - y0) / (x1 - x0)
        return y1 + max(slope, 0.0) * (tokens - x1) if i == len(points) else y0 + slope * (tokens - x0)

    def near(self, tokens: float) -> bool:
        """Whether a size within a factor of 1.5 was measured."""
        return any(tokens / 1.5 <= measured <= tokens * 1.5 for measured, _ in self.points)

    def table(self) -> dict[str, float]:
        """Return {tokens: seconds} for JSON."""
        return {f"{tokens:.3g}": seconds for tokens, seconds in self.points}


class DriftingRate:
    """An estimate of a frequency that drifts or jumps, and the weight of its evidence."""

    def __init__(self, config: TunerConfig) -> None:
        self.config = config
        self.mean = self.weight = self.recent = 0.0
        self.last = 0

    def add(self, hits: float, trials: int, now: int) -> bool:
        """Learn from some trials in step number `now`. Returns whether the frequency has jumped."""
        if not trials:
            return False
        kept = self.weight * 0.5 ** (max(trials, now - self.last) / self.config.half_life)
        self.mean = (self.mean * kept + hits) / (kept + trials)
        self.weight, self.last = kept + trials, now
        short = 0.5 ** (trials / self.config.jump_half_life) if self.weight > trials else 0.0
        self.recent = self.recent * short + hits / trials * (1 - short)
        jumped = abs(self.recent - self.mean) > 0.5  # more than three standard deviations of chance
        if jumped:
            self.mean, self.weight = self.recent, self.config.jump_half_life
        return jumped

    def value(self, prior: float) -> float:
        """Return the frequency. The prior counts as one trial."""
        return (self.mean * self.weight + prior) / (self.weight + 1)
