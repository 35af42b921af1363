"""The benchmark of speculation on tiny models measures what it claims."""

from __future__ import annotations

import importlib
from argparse import Namespace
from pathlib import Path

import pytest


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model, tokenizer):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    speculation = importlib.import_module("speculation")
    for name, seed in (("base", 0), ("arm", 1)):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.setattr(speculation, "QUESTIONS", ["a cat", "the sea"])
    args = {"part": "pair", "base": tmp_path / "base", "arm": tmp_path / "arm", "dtype": "fp32", "skip": []}
    args |= {
        "batch": [1, 2],
        "k": [2],
        "tokens": 6,
        "rounds": 2,
        "weight": 1.0,
        "weights": [0.0, 1.0],
        "quantization": None,
    }
    return speculation, speculation.Case(Namespace(**args, temperature=1.0))


def test_every_contender_runs_and_drafts_change_nothing(case):
    speculation, case = case
    lines = [line for batch in (1, 2) for line in speculation.measure(case, batch)]
    assert [line["contender"] for line in lines if line["batch"] == 1] == [
        "base alone, Hugging Face",
        "base alone",
        "K = 0",
        "naive loop over two models",
        "base alone, Hugging Face assisted",
        "K = 2",
        "auto",
    ]
    assert all(line["same text"] == 1 for line in lines if "same text" in line)
    assert all(line["x K = 0"] == 1 for line in lines if line["contender"] == "K = 0")


def test_the_same_noise_agrees_at_most_as_often_as_the_best_coupling(case):
    speculation, case = case
    case.args.tokens, case.args.rounds = 60, 4
    nothing, guided = speculation.agreement(case)
    assert guided["tempered, same noise"] < guided["tempered, Σ min(p, q)"] + 0.1
    assert guided["tempered, Σ min(p, q)"] > nothing["tempered, Σ min(p, q)"]
