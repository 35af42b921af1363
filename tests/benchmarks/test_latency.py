"""The benchmark of latencies, in its short form: tiny models, few requests."""

from __future__ import annotations

import argparse
import asyncio
import importlib
from pathlib import Path
from types import ModuleType

import pytest

from genarm_fast import GenARM


@pytest.fixture
def latency(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("latency")


def test_lines_of_all_contenders(latency, tiny_model, tokenizer, tmp_path, capsys):
    model = GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer)
    args = argparse.Namespace(parts=latency.PARTS, callers=[2], loads=[0.5], requests=4, prompt=5, tokens=3, alone=0.05)
    found = asyncio.run(latency.run(model, tiny_model(), args, lambda _: None))
    keys = [(line["contender"], line["callers"], line["load"]) for line in found["results"]]
    assert keys == [
        ("genarm_fast", 1, "closed loop"),
        ("genarm_fast", 2, "closed loop"),
        ("genarm_fast", 2, "50%"),
        ("Hugging Face, base", 1, "closed loop"),
        ("Hugging Face, base", 1, "50%"),
    ]
    for line in found["results"]:
        for what in ("first", "gap"):
            values = list(line[what].values())
            assert values == sorted(values)
            assert values[0] > 0
    assert found["ticker"]["ticks"] > 1
    assert found["ticker alone"]["ticks"] > 1
    latency.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    latency.show(found | {"about": {}})
    assert "Hugging Face, base" in capsys.readouterr().out


def test_times_of_a_request(latency, monkeypatch):
    """Three chunks: one first time since the arrival, two gaps."""
    now = iter([3.0, 3.5, 4.5])
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(now))

    async def request(number, mark):
        for _ in range(3):
            mark()

    times = latency.Times()
    asyncio.run(times.of(request, 0, 1.0))
    assert (times.first, times.gaps) == ([2.0], [0.5, 1.0])


def test_percentiles(latency):
    values = [i / 1000 for i in range(1000, 0, -1)]
    assert latency.percentiles(values) == pytest.approx({"p50": 500, "p99": 990, "p99.9": 999, "max": 1000})
    assert latency.percentiles([0.002]) == pytest.approx(dict.fromkeys(latency.SHARES, 2))
