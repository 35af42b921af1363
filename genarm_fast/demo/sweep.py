"""A sweep over two ARMs' weights: each request has its own weights, so a grid of them is decoded in one batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from genarm_fast.api import GenARM
from genarm_fast.demo.compare import chat, positivity
from genarm_fast.params import SamplingParams

Grids = Mapping[str, Sequence[float]]  # names of two ARMs, each with the weights to try


@dataclass(frozen=True, slots=True)
class Point:
    """The scores of the answers with one pair of weights: (mean over the prompts, its standard error)."""

    weights: tuple[float, float]
    positivity: tuple[float, float]  # VADER, -1 to 1
    tokens: tuple[float, float]  # tokens of an answer, end token included


def sweep(
    model: GenARM,
    grids: Grids,
    prompts: Sequence[str],
    params: SamplingParams,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[Point]:
    """Answer all prompts with every pair of the two ARMs' weights. Prompt i has seed params.seed + i in all.

    track: wraps the sequence of batches, to show progress.
    """
    first, second = grids
    pairs = [(a, b) for a in grids[first] for b in grids[second]]
    requests = [
        (
            prompt,
            params.override(seed=(params.seed or 0) + i, weights=_weights(model, {first: pair[0], second: pair[1]})),
        )
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


def sweep_table(points: Sequence[Point], grids: Grids) -> Table:
    """Return a table: rows are weights of the first ARM, columns are weights of the second."""
    table = Table(title="positivity (VADER) and tokens per answer, mean ± standard error", title_style="")
    first, second = grids
    table.add_column(f"{first} ↓  {second} →", justify="right")
    cells = {point.weights: point for point in points}
    for column in grids[second]:
        table.add_column(f"{column:g}", justify="center")
    for row in grids[first]:
        texts = []
        for column in grids[second]:
            point = cells[row, column]
            score, tokens = point.positivity, point.tokens
            texts.append(f"{score[0]:+.2f} ± {score[1]:.2f}\n{tokens[0]:.0f} ± {tokens[1]:.0f} tokens")
        table.add_row(f"{row:g}", *texts, end_section=True)
    return table


def sweep_plot(points: Sequence[Point], grids: Grids, path: Path) -> None:
    """Write the trade-off as a PNG: a line for each weight of the first ARM, a marker for each of the second."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first, second = grids
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    colours = ("#9e9e9e", "#6fadde", "#1f5f99")
    for weight, colour in zip(grids[first], colours):
        line = [point for point in points if point.weights[0] == weight]
        axes.errorbar(
            [point.tokens[0] for point in line],
            [point.positivity[0] for point in line],
            xerr=[point.tokens[1] for point in line],
            yerr=[point.positivity[1] for point in line],
            color=colour,
            marker="o",
            capsize=2,
            elinewidth=0.7,
            label=f"{first} {weight:g}",
        )
        for point in line:
            place = (point.tokens[0], point.positivity[0])
            axes.annotate(f"{point.weights[1]:g}", place, xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel("tokens per answer")
    axes.set_ylabel("positivity (VADER)")
    axes.set_title(f"Weights of two ARMs; the number at a point is {second}'s", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _weights(model: GenARM, chosen: Mapping[str, float]) -> tuple[float, ...]:
    return tuple(chosen.get(name, 0.0) for name in model.arm_names)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error
