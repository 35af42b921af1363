"""What rounds cost and settle: estimates from noisy measurements, and what they promise."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from math import log2

FREE = 16  # tokens: where nothing is known, a forward of n takes as long as FREE + n
HALF_LIFE = 32.0  # rounds, and rows with a draft, in which evidence on acceptance loses half of its weight
QUICK = 4.0  # the same where a sudden change is looked for
SAMPLES = 7  # timings of each size that are kept


def expected_tokens(acceptance: Sequence[float]) -> float:
    """Tokens that a round settles: 1 + a₁ + a₁a₂ + ..., aⱼ the chance that draft j is right if those before it are."""
    total = all_right = 1.0
    for each in acceptance:
        all_right *= each
        total += all_right
    return total


def expected_speedup(cost: float, acceptance: float, k: int, *, verify: float = 1.0) -> float:
    """Speed of rounds with k drafts by an ARM relative to plain decoding, for one row (docs/speculation.md).

    S = (1 + c) E / (c (k + a^k) + v), E = 1 + a + ... + a^k. If all k drafts are right, the ARM runs once more on the
    last one, so that what follows it can be settled too.

    Args:
        cost: c, an ARM forward in units of a forward of everything else.
        acceptance: a, the chance that a draft is right if those before it are.
        verify: v, a forward of k + 1 tokens of everything else, relative to one of a single token.
    """
    return (1 + cost) * expected_tokens([acceptance] * k) / (cost * (k + acceptance**k if k else 1.0) + verify)


def best_k(cost: float, acceptance: float, max_k: int) -> int:
    """The k from 0 to max_k with the largest `expected_speedup`."""
    return max(range(max_k + 1), key=lambda k: expected_speedup(cost, acceptance, k))


class Costs:
    """Seconds of a forward over its number of tokens: lower quartiles of the last ones, sizes within 12 % together."""

    def __init__(self) -> None:
        self.times: dict[int, deque[float]] = {}
        self.points: list[tuple[float, float]] = []  # tokens, seconds

    def add(self, tokens: float, seconds: float) -> None:
        self.times.setdefault(round(6 * log2(tokens)), deque(maxlen=SAMPLES)).append(max(seconds, 1e-9))
        sizes = sorted(self.times)
        # What else runs on the machine only ever adds to a time. And a size that was seldom measured was held up if it
        # took more than a larger one, or more per token than a smaller one.
        found = {size: sorted(self.times[size])[(len(self.times[size]) - 1) // 4] for size in sizes}
        for small, large in reversed([*pairwise(sizes)]):
            if len(self.times[small]) < 3:
                found[small] = min(found[small], found[large])
        for small, large in pairwise(sizes):
            if len(self.times[large]) < 3:
                found[large] = min(found[large], found[small] * 2 ** ((large - small) / 6))
        self.points = [(2 ** (size / 6), found[size]) for size in sizes]

    def at(self, tokens: float, known: tuple[float, float] | None = None) -> float:
        """Interpolated, or extended along the last two, or as `FREE` says.

        `known`: a point below all measured ones, if there is none.
        """
        points = self.points
        if known is not None and (not points or known[0] < 0.9 * points[0][0]):
            points = [known, *points]
        i = bisect_left(points, (tokens, 0.0))
        if i == 0:
            return points[0][1]
        if len(points) == 1:
            return points[0][1] * (FREE + tokens) / (FREE + points[0][0])
        (x0, y0), (x1, y1) = points[min(i, len(points) - 1) - 1 :][:2]
        slope = (y1 - y0) / (x1 - x0)
        return y1 + max(slope, 0.0) * (tokens - x1) if i == len(points) else y0 + slope * (tokens - x0)

    def near(self, tokens: float, factor: float, times: int = 1) -> bool:
        """Whether sizes within this factor were measured so many times."""
        return sum(len(t) for size, t in self.times.items() if abs(log2(tokens) - size / 6) <= log2(factor)) >= times


class Rate:
    """A frequency that drifts or jumps, with how much evidence there is for it."""

    def __init__(self) -> None:
        self.mean = self.weight = self.recent = 0.0
        self.last = 0

    def add(self, hits: float, trials: int, now: int) -> bool:
        """Whether it has jumped."""
        if not trials:
            return False
        faded = self.weight * 0.5 ** (max(trials, now - self.last) / HALF_LIFE)
        self.mean = (self.mean * faded + hits) / (faded + trials)
        self.weight, self.last = faded + trials, now
        keep = 0.5 ** (trials / QUICK) if self.weight > trials else 0.0
        self.recent = self.recent * keep + hits / trials * (1 - keep)
        jumped = abs(self.recent - self.mean) > 0.5  # over three standard deviations of chance
        if jumped:
            self.mean, self.weight = self.recent, QUICK
        return jumped

    def value(self, prior: float) -> float:
        return (self.mean * self.weight + prior) / (self.weight + 1)
