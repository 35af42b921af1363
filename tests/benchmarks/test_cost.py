"""The measured cost of methods, on methods of known cost."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from genarm_fast import GenARM


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.fixture
def costs(script, tiny_model, tokenizer) -> dict:
    cost, Response = script("cost"), script("baselines.interface").Response
    models = SimpleNamespace(tokenizer=tokenizer)
    calls: Counter[str] = Counter()

    def method(name: str, dearer: int):
        def run(prompts, params):
            calls[name] += 1
            spin(2e-3 * dearer * params.max_new_tokens)
            assert len(set(map(tuple, prompts))) == len(prompts)
            forwards = Counter(base=dearer * params.max_new_tokens)
            return [Response([1] * params.max_new_tokens, forwards) for _ in prompts]

        return run

    chosen = {"base": method("base", 1), "guided, w = 1": method("guided", 2), "best of 4": method("best", 4)}
    found = cost.measure(models, chosen, 2, 4, 5, 1)
    assert calls["best"] == 1 + 1 + 1  # calls for one token: warm-up and one timed; for all tokens: one timed
    chosen = cost.at_batch(chosen, 3, 2)
    assert list(chosen) == ["base", "guided, w = 1"], "methods that search run at the first batch size alone"
    calls.clear()
    third = cost.measure(models, chosen, 3, 4, 5, 1)
    assert calls == {"base": 11, "guided": 11}  # the base is not timed again for methods that do not run
    return {"batches": {"2": found, "3": third}, "peak_mib": {"2": {"base": 100.0}, "3": {"base": 300.0}}}


def test_prompts_are_the_engines(script, tiny_model, tokenizer) -> None:
    engine = GenARM.from_pretrained(tiny_model(), tokenizer=tokenizer)
    chats = [[{"role": "user", "content": f"{number}. {script('cost').TEXT}"}] for number in (1, 2)]
    found = script("cost").prompts_of(SimpleNamespace(tokenizer=tokenizer), 2)
    assert found == [request.token_ids[0] for request in engine.prepare(chats)]


def test_a_policy_is_loaded_alone(script) -> None:
    """For its peak memory, no engine and no other policy is loaded beside it."""
    methods, params = script("quality_methods"), script("baselines.interface").Params(1)
    models = methods.Models({}, None)
    methods.general(models, methods.SIZES["quick"])["policy"](script("cost").prompts_of(models, 2), params)
    assert {"tokenizer", "first_objective"} <= set(vars(models))
    assert not {"engine", "base", "objectives"} & set(vars(models))
    assert models.objectives[0] is models.first_objective


def test_ratios_and_forwards(costs: dict) -> None:
    found = costs["batches"]["2"]
    assert found["base"]["to_base"]["median"] == 1.0
    assert 1.5 < found["guided, w = 1"]["to_base"]["median"] < 2.7
    assert 2.5 < found["best of 4"]["to_base"]["median"] < 6.5
    assert found["guided, w = 1"]["forwards_per_token"] == {"base": 2.0}
    first, whole = (found["base"][name]["median"] for name in ("first_token_seconds", "seconds"))
    assert 2 < whole / first < 7


def test_table_and_plot(costs: dict, script, tmp_path: Path) -> None:
    cost = script("cost")
    table = cost.table(costs)
    assert table.count("\n") == 6
    assert [line.split("|")[1:3] + line.split("|")[-2:-1] for line in table.splitlines()[2::3]] == [
        [" 2 ", " base ", " 100 "],
        [" 3 ", " base ", " 300 "],
    ]
    without = cost.table(costs | {"peak_mib": {}})
    assert "MiB" not in without
    assert {line.count("|") for line in without.splitlines()} == {7}
    rate = {"value": 0.7, "low": 0.6, "high": 0.8}
    quality = {"methods": {name: {"win_rate": rate} for name in ("base", "guided, w = 1", "elsewhere")}}
    cost.plot(costs, quality, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 1000


def test_memory_is_added_to_times_of_the_same_size(script, tmp_path: Path) -> None:
    cost, path = script("cost"), tmp_path / "cost.json"
    size = cost.SIZES["short"]
    path.write_text(json.dumps({"tokens": 8, "size": asdict(size), "peak_mib": {}}))
    assert cost.timed_before(path, 8, size)["tokens"] == 8
    for other in ((path, 9, size), (path, 8, cost.SIZES["full"]), (tmp_path / "none", 8, size), (None, 8, size)):
        with pytest.raises(SystemExit, match="expected times of"):
            cost.timed_before(*other)
