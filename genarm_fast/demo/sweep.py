"""A sweep over two ARMs' weights: each request brings its own weights, so a grid of them is decoded in one batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from genarm_fast.api import GenARM
from genarm_fast.demo.compare import chat, positivity
from genarm_fast.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Point:
    """What the answers score with one pair of weights: (mean over the prompts, its standard error)."""

    weights: tuple[float, float]
    positivity: tuple[float, float]  # VADER, -1 to 1
    tokens: tuple[float, float]  # per answer, end token included


def sweep(
    model: GenARM,
    arms: tuple[str, str],
    grid: Sequence[float],
    prompts: Sequence[str],
    params: SamplingParams,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[Point]:
    """Answers all prompts with every pair of weights from `grid`; prompt i has the seed params.seed + i with all pairs.

    `track` wraps the sequence of batches, to show progress.
    """
    pairs = [(first, second) for first in grid for second in grid]
    requests = [
        (prompt, params.override(seed=(params.seed or 0) + i, weights=_weights(model, arms, pair)))
        for i, prompt in enumerate(prompts)
        for pair in pairs
    ]
    outputs = []
    for start in track(range(0, len(requests), model.max_batch_size)):
        batch = requests[start : start + model.max_batch_size]
        outputs += model.generate([chat(prompt) for prompt, _ in batch], [each for _, each in batch])
    return [
        Point(
            pair,
            _mean([positivity(output.text) for output in outputs[i :: len(pairs)]]),
            _mean([len(output.token_ids) for output in outputs[i :: len(pairs)]]),
        )
        for i, pair in enumerate(pairs)
    ]


def sweep_table(points: Sequence[Point], arms: tuple[str, str]) -> Table:
    """Rows: weights of the first ARM; columns: weights of the second."""
    table = Table(title="positivity (VADER) and tokens per answer, mean ± standard error", title_style="")
    table.add_column(f"{arms[0]} ↓  {arms[1]} →", justify="right")
    cells = {point.weights: point for point in points}
    rows, columns = (sorted({weights[axis] for weights in cells}) for axis in (0, 1))
    for column in columns:
        table.add_column(f"{column:g}", justify="center")
    for row in rows:
        texts = []
        for column in columns:
            point = cells[row, column]
            score, tokens = point.positivity, point.tokens
            texts.append(f"{score[0]:+.2f} ± {score[1]:.2f}\n{tokens[0]:.0f} ± {tokens[1]:.0f} tokens")
        table.add_row(f"{row:g}", *texts, end_section=True)
    return table


def sweep_plot(points: Sequence[Point], arms: tuple[str, str], path: Path) -> None:
    """Writes the trade-off as a PNG: a line per weight of the first ARM, a marker per weight of the second."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    colours = ("#9e9e9e", "#6fadde", "#1f5f99", "#0b2e4f")
    for i, weight in enumerate(sorted({point.weights[0] for point in points})):
        line = [point for point in points if point.weights[0] == weight]
        axes.errorbar(
            [point.tokens[0] for point in line],
            [point.positivity[0] for point in line],
            xerr=[point.tokens[1] for point in line],
            yerr=[point.positivity[1] for point in line],
            color=colours[i % len(colours)],
            marker="o",
            capsize=2,
            elinewidth=0.7,
            label=f"{arms[0]} {weight:g}",
        )
        for point in line:
            place = (point.tokens[0], point.positivity[0])
            axes.annotate(f"{point.weights[1]:g}", place, xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel("tokens per answer")
    axes.set_ylabel("positivity (VADER)")
    axes.set_title(f"Weights of two ARMs; the number at a point is {arms[1]}'s", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _weights(model: GenARM, arms: tuple[str, str], pair: tuple[float, float]) -> tuple[float, ...]:
    chosen = dict(zip(arms, pair))
    return tuple(chosen.get(name, 0.0) for name in model.arm_names)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error
