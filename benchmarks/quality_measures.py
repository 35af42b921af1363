"""Measures of texts: win rates, recovered gaps, fronts, and signs that a text exploits its judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
Array = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval: percentiles over resampled prompts. All seeds of a prompt stay together."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def estimate(figure: Callable[[Array], float], prompts: int, seed: int = 0) -> Estimate:
    """Return the figure over all prompts, and its bootstrap interval over resampled prompts.

    figure: maps indices of prompts to a number. Resamples for which it is not finite are left out.

    Raises:
        ValueError: the figure is not finite over all prompts.
    """
    value = figure(np.arange(prompts))
    if not np.isfinite(value):
        raise ValueError(f"figure: expected a finite number on all {prompts} prompts, got {value}")
    rng = np.random.default_rng(seed)
    found = np.array([figure(rng.integers(prompts, size=prompts)) for _ in range(RESAMPLES)])
    return Estimate(float(value), *(float(q) for q in np.percentile(found[np.isfinite(found)], [2.5, 97.5])))


def mean(values: Array) -> Estimate:
    """Return the mean of one value per prompt, [n], with its interval."""
    return estimate(lambda chosen: float(values[chosen].mean()), len(values))


def win_rate(ours: Array, theirs: Array) -> Estimate:
    """Return the share of wins of scores [prompts, seeds]; a tie counts half.

    Each pair counts in both orders. All judges here score single texts, so both orders agree."""
    first = (ours > theirs) + (ours == theirs) / 2
    second = 1 - ((theirs > ours) + (theirs == ours) / 2)
    return mean(((first + second) / 2).mean(1))


def recovered(base: Array, ours: Array, target: Array) -> Estimate | None:
    """Return (ours − base) / (target − base) of the mean scores, from one value per prompt, [n].

    None if the target's gain is not above 0 by two standard errors: a share of no gap means nothing."""
    gap = target - base
    if gap.mean() <= 2 * gap.std(ddof=1) / len(gap) ** 0.5:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return estimate(lambda chosen: float((ours - base)[chosen].mean() / gap[chosen].mean()), len(base))


def hypervolume(points: Array, reference: Sequence[float] = (0.0, 0.0)) -> float:
    """Return the area that points [n, 2] dominate beyond the reference. Larger is better in both objectives."""
    area, best = 0.0, reference[1]
    for x, y in sorted(map(tuple, points), reverse=True):  # the largest first objective comes first
        if x > reference[0] and y > best:
            area += (x - reference[0]) * (y - best)
            best = y
    return area


def mean_inner_product(points: Array, weights: Array) -> float:
    """Return the mean over the front of w · objectives(w), both [n, 2]: how well points follow their weights."""
    return float((points * weights).sum(1).mean())


def repetition(texts: Sequence[str], n: int = 3) -> Array:
    """Return, for each text, the share of its word n-grams that occurred before in it, [n]."""
    shares = []
    for text in texts:
        words = text.lower().split()
        grams = list(zip(*(words[i:] for i in range(n))))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return np.array(shares)


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Return the share of different word n-grams among all texts of a method.

    It falls with the amount of text, so compare methods whose texts have one length."""
    grams = [gram for text in texts for gram in zip(*(text.lower().split()[i:] for i in range(n)))]
    return len(set(grams)) / len(grams) if grams else 0.0
