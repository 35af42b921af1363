"""The benchmark of calls compares method and function on the same models, as folders and as objects."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

import genarm_fast
from genarm_fast import GenARM


@pytest.fixture
def call_overhead(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("call_overhead")


@pytest.mark.parametrize("given", [False, True])
def test_both_run_on_the_same_models(call_overhead, tiny_model, tokenizer, tmp_path, monkeypatch, given):
    """Each of the two runs on its own model, which is loaded once."""
    genarm_fast.release()
    loads, load = [], GenARM.from_pretrained
    monkeypatch.setattr(
        GenARM, "from_pretrained", staticmethod(lambda *args, **kw: loads.append(args) or load(*args, **kw))
    )
    tiny_model().save_pretrained(tmp_path)
    base, arms = (tiny_model(), [tiny_model(seed=1)]) if given else (str(tmp_path), [])
    found = call_overhead.measure(base, arms, {"tokenizer": tokenizer}, 2, 3)
    genarm_fast.release()
    assert set(found) == {"method", "function", "look", "difference", "share"}
    assert found["share"] == found["look"] / found["method"]
    assert len(loads) == 2
