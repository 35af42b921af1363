"""Measures of a front of two objectives, and of policies that were trained for single points of a front.

Objectives lie in [0, 1]: P(positive) by the judge, and 1 - tokens / limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from quality_measures import Estimate, estimate, hypervolume, mean, mean_inner_product
from quality_methods import TRAINED, Size, point_name, shares
from quality_runs import Texts


def objectives(texts: Texts, judge: Any, size: Size) -> np.ndarray:
    """Return both objectives of each prompt, [prompts, 2], as means over its seeds."""
    return np.stack([texts.scores(judge).mean(1), 1 - texts.tokens.mean(1) / size.tokens], -1)


def methods_of(found: Mapping[str, Texts]) -> list[str]:
    """Return the names of the methods that have a text for every point of the front."""
    return [name for name in dict.fromkeys(name.rsplit(" ", 1)[0] for name in found) if name != TRAINED]


def front_figures(found: Mapping[str, Texts], judge: Any, size: Size) -> dict[str, Any]:
    """Return the points, hypervolume over (0, 0) and mean inner product of every method that has all points."""
    points = shares(size.points)
    weights = np.array([[a, 1 - a] for a in points])
    results: dict[str, Any] = {}
    for method in methods_of(found):
        values = np.stack(
            [objectives(found[point_name(method, a)], judge, size) for a in points]
        )  # [points, prompts, 2]

        def of(figure: Any, values: np.ndarray = values) -> Estimate:
            return estimate(lambda chosen: figure(values[:, chosen].mean(1)), values.shape[1])

        results[method] = {
            "points": values.mean(1).tolist(),
            "hypervolume": asdict(of(hypervolume)),
            "mean_inner_product": asdict(of(lambda points: mean_inner_product(points, weights))),
        }
    return results


def single_points(found: Mapping[str, Texts], judge: Any, size: Size, given: Sequence[float]) -> dict[str, Any]:
    """Return both objectives of every method, and their weighted sum, at each share that has a policy of its own."""
    results: dict[str, Any] = {}
    for share in given:
        at = results[f"{share:.2f}"] = {}
        for method in (TRAINED, *methods_of(found)):
            values = objectives(found[point_name(method, share)], judge, size)
            figures = values[:, 0], values[:, 1], values @ np.array([share, 1 - share])
            at[method] = dict(zip(("positive", "short", "inner_product"), (asdict(mean(each)) for each in figures)))
    return results


def points_table(points: Mapping[str, Any]) -> str:
    """Return the result of `single_points` as a Markdown table."""
    lines = ["| share | method | P(positive) | 1 - tokens / limit | inner product |", "|---|---|---|---|---|"]
    for share, at in points.items():
        for method, figures in at.items():
            lines.append(f"| {share} | {method} | {' | '.join(str(Estimate(**each)) for each in figures.values())} |")
    return "\n".join(lines)
