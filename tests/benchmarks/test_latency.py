"""The benchmark of latencies, in its short form: tiny models, few requests."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import pytest

from genarm_fast import GenARM


@pytest.fixture
def latency(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("latency")


class StandIn:
    """A stand-in for vLLM's engine: it answers a request with one chunk per token asked for."""

    def __init__(self):
        self.asked = []

    async def generate(self, prompt, params, request_id):
        self.asked.append((len(prompt["prompt_token_ids"]), request_id))
        for _ in range(params["max_tokens"]):
            await asyncio.sleep(1e-3)
            yield


@pytest.fixture
def stand_in(latency, monkeypatch):
    engine = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", SimpleNamespace(RequestOutputKind=Mock()))
    monkeypatch.setattr(latency, "vllm_engine", lambda source, callers, length: nullcontext(engine))
    return engine


def test_lines_of_all_contenders(latency, tiny_model, tokenizer, tmp_path, capsys, stand_in):
    model = GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer)
    args = argparse.Namespace(parts=latency.PARTS, callers=[2], loads=[0.5], requests=4, prompt=5, tokens=3, alone=0.05)
    found = asyncio.run(latency.run("base", model, tiny_model(), args, lambda _: None))
    keys = [(line["contender"], line["callers"], line["load"]) for line in found["results"]]
    assert keys == [
        ("genarm_fast", 1, "closed loop"),
        ("genarm_fast", 2, "closed loop"),
        ("genarm_fast", 2, "50%"),
        ("Hugging Face, base", 1, "closed loop"),
        ("Hugging Face, base", 1, "50%"),
        ("vLLM, base", 2, "closed loop"),
        ("vLLM, base", 2, "50%"),
    ]
    assert stand_in.asked == [(5, str(i)) for i in range(10)]
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
    """Three chunks give one time to the first since the arrival, and two gaps."""
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
