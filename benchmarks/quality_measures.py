"""What texts are measured by: win rates, gaps, fronts, and the signs of a judge that is being hacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
Array = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval: percentiles over resampled prompts, whose seeds stay together."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def estimate(figure: Callable[[Array], float], prompts: int, seed: int = 0) -> Estimate:
    """figure: of the indices of the prompts that take part. Resamples in which it is not defined are left out.

    Raises:
        ValueError: it is not defined for the prompts as they are.
    """
    value = figure(np.arange(prompts))
    if not np.isfinite(value):
        raise ValueError(f"figure: expected a finite number on all {prompts} prompts, got {value}")
    rng = np.random.default_rng(seed)
    found = np.array([figure(rng.integers(prompts, size=prompts)) for _ in range(RESAMPLES)])
    return Estimate(float(value), *(float(q) for q in np.percentile(found[np.isfinite(found)], [2.5, 97.5])))


def mean(values: Array) -> Estimate:
    """Of one value a prompt [n]."""
    return estimate(lambda chosen: float(values[chosen].mean()), len(values))


def win_rate(ours: Array, theirs: Array) -> Estimate:
    """Share of wins, a tie as a half, of scores [prompts, seeds]. Each pair is shown in both orders; a judge of single
    texts, as ours are, says the same in both, and one that reads pairs would be averaged over them."""
    first = (ours > theirs) + (ours == theirs) / 2
    second = 1 - ((theirs > ours) + (theirs == ours) / 2)
    return mean(((first + second) / 2).mean(1))


def recovered(base: Array, ours: Array, target: Array) -> Estimate | None:
    """(ours − base) / (target − base) of mean scores, values a prompt [n]; None where the target's gain is not above 0
    by two standard errors: a share of no gap means nothing."""
    gap = target - base
    if gap.mean() <= 2 * gap.std(ddof=1) / len(gap) ** 0.5:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return estimate(lambda chosen: float((ours - base)[chosen].mean() / gap[chosen].mean()), len(base))


def hypervolume(points: Array, reference: Sequence[float] = (0.0, 0.0)) -> float:
    """Area that points [n, 2] dominate beyond the reference, both objectives to be raised."""
    area, best = 0.0, reference[1]
    for x, y in sorted(map(tuple, points), reverse=True):  # from the largest first objective on
        if x > reference[0] and y > best:
            area += (x - reference[0]) * (y - best)
            best = y
    return area


def mean_inner_product(points: Array, weights: Array) -> float:
    """Mean over the front of w · objectives(w), both [n, 2]: whether a point goes where its weights ask."""
    return float((points * weights).sum(1).mean())


def repetition(texts: Sequence[str], n: int = 3) -> Array:
    """Share of word n-grams that occurred before in the same text."""
    shares = []
    for text in texts:
        words = text.lower().split()
        grams = list(zip(*(words[i:] for i in range(n))))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return np.array(shares)


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Share of different word n-grams among all of a condition's texts. It falls with the amount of text: compare
    conditions of one length."""
    grams = [gram for text in texts for gram in zip(*(text.lower().split()[i:] for i in range(n)))]
    return len(set(grams)) / len(grams) if grams else 0.0
