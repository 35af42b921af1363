"""The registry of benchmarks, and the comparison of two of its result files."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_benchmark_in_ten_lines(script, tmp_path: Path, capsys) -> None:
    registry = script("registry")

    @registry.benchmark
    def spinning():
        yield registry.Case("spin", {"ours": lambda: spin(2e-3), "slower": lambda: spin(8e-3)})

    with pytest.raises(ValueError, match="'spinning'"):
        registry.benchmark(spinning)
    path = tmp_path / "found.json"
    registry.main(["spinning", "--rounds", "5", "--json", str(path)])
    found = json.loads(path.read_text())
    (result,) = found["results"]
    assert result["benchmark"] == "spinning"
    assert result["ours"] == "ours"
    assert set(result["speedup"]) == {"slower"}
    assert 2 < result["speedup"]["slower"]["median"] < 8  # four times the CPU time
    assert path.with_suffix(".png").stat().st_size > 1000
    assert {"device", "date", "load", "torch"} <= found["machine"].keys()
    assert "times as fast as" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        registry.main(["nothing"])


def test_short_calls_are_repeated(script) -> None:
    registry = script("registry")
    now = [0.0]

    def run() -> None:
        now[0] += 1e-4

    repeated = registry.Repeated(run, lambda: now[0])
    repeated(0)
    assert repeated.calls == 20
    before = now[0]
    repeated(1)
    assert now[0] - before == pytest.approx(20 * 1e-4)


def test_name_of_the_result_file(script) -> None:
    path = script("registry").default_path({"date": "2026-11-28", "device": "AMD EPYC 7B13 @ 2 GHz"})
    assert path.name == "2026-11-28-amd-epyc-7b13-2-ghz.json"


def result_file(**speedups: tuple[float, float, float]) -> dict:
    about = {"device": "a", "threads": 1, "torch": "2"}
    results = [
        {"benchmark": "b", "case": case, "speedup": {"other": dict(zip(("median", "low", "high"), figure))}}
        for case, figure in speedups.items()
    ]
    return {"machine": about, "results": results}


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ((1.5, 1.4, 1.6), "loss"),
        ((1.8, 1.5, 1.95), ""),  # the intervals touch
        ((1.87, 1.865, 1.88), "loss"),
        ((3.0, 2.9, 3.1), "gain"),
        ((2.0, 1.9, 2.1), ""),
    ],
)
def test_losses_beyond_noise(script, after, verdict: str) -> None:
    compare = script("compare")
    before = result_file(one=(2.0, 1.9, 2.1))
    (change,), missing = compare.changes(before, result_file(one=after), 0.05)
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(after[0] / 2)
    assert missing == []


def test_a_small_loss_is_tolerated(script) -> None:
    compare = script("compare")
    before, after = result_file(one=(2.0, 1.99, 2.01)), result_file(one=(1.94, 1.93, 1.95))
    assert compare.changes(before, after, 0.05)[0][0].verdict == ""
    assert compare.changes(before, after, 0.01)[0][0].verdict == "loss"


@pytest.mark.parametrize(
    ("after", "code"),
    [
        (result_file(one=(2.0, 1.9, 2.1), two=(1.0, 0.9, 1.1)), 0),
        (result_file(one=(1.0, 0.9, 1.1), two=(1.0, 0.9, 1.1)), 1),
        (result_file(one=(2.0, 1.9, 2.1)), 1),  # a missing measurement counts as a loss
    ],
)
def test_exit_status(script, tmp_path: Path, monkeypatch, capsys, after: dict, code: int) -> None:
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, found in zip(paths, (result_file(one=(2.0, 1.9, 2.1), two=(1.0, 0.9, 1.1)), after)):
        path.write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, paths)])
    with pytest.raises(SystemExit) as stopped:
        script("compare").main()
    assert int(stopped.value.code) == code
    assert ("missing" in capsys.readouterr().out) == (len(after["results"]) == 1)
