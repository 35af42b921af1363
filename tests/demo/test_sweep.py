"""The sweep, compared with one request at a time, and its table and plot."""

from __future__ import annotations

import io
from itertools import product
from pathlib import Path

import pytest
from rich.console import Console

from genarm_fast import GenARM, SamplingParams
from genarm_fast.demo.compare import chat, positivity
from genarm_fast.demo.sweep import Point, sweep, sweep_plot, sweep_table

GRIDS = {"positive": (0.0, 2.0), "concise": (0.0, 2.0)}
POINTS = [Point(pair, (0.1 * i, 0.05), (30.0 - i, 2.0)) for i, pair in enumerate(product((0.0, 2.0), repeat=2))]


def test_sweep_equals_single_requests(model: GenARM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 8 rows also cut the grid of 9 anywhere, and the ARMs are taken by name, not by position."""

    def letters(text: str) -> float:  # gives any two texts different scores; VADER knows none of their words
        return float(sum(map(ord, text)))

    monkeypatch.setattr("genarm_fast.demo.sweep.positivity", letters)
    grids, prompts = {"small": (0.0, 1.0, -0.5), "positive": (0.0, 2.0, 1.0)}, ["the cat", "a man", "this"]
    points = sweep(model, grids, prompts, SamplingParams(max_new_tokens=6, seed=5))
    assert [point.weights for point in points] == list(product(*grids.values()))
    for point in points:
        small, positive = point.weights
        outputs = [
            model.generate(chat(prompt), seed=5 + i, weights=[positive, 0.0, small], max_new_tokens=6)[0]
            for i, prompt in enumerate(prompts)
        ]
        lengths = [len(output.token_ids) for output in outputs]
        assert point.tokens[0] == pytest.approx(sum(lengths) / 3)
        assert point.positivity[0] == pytest.approx(sum(letters(output.text) for output in outputs) / 3)


def test_table_has_every_point() -> None:
    console = Console(width=100, file=io.StringIO())
    console.print(sweep_table(POINTS, GRIDS))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("positive ↓", "concise →", "+0.00 ± 0.05", "+0.30 ± 0.05", "30 ± 2 tokens", "27 ± 2 tokens"):
        assert part in text


def test_plot_is_a_picture(tmp_path: Path) -> None:
    sweep_plot(POINTS, GRIDS, tmp_path / "new" / "sweep.png")
    assert (tmp_path / "new" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_judge_tells_tone() -> None:
    assert positivity("A wonderful, happy day.") > 0.5 > -0.5 > positivity("A terrible, sad failure.")
