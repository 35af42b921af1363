"""A curve over training pairs: what is trained and ranked, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")


@pytest.fixture
def curves(script, tmp_path: Path, monkeypatch, tiny_model, tokenizer) -> Any:
    module = script("learning_curve")
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(module, "base", lambda: folder)
    monkeypatch.setattr(module, "DTYPE", torch.float32)
    return module


def write(path: Path, count: int, good: str, bad: str) -> None:
    rows = [{"prompt": f"say {i}", "chosen": good, "rejected": bad} for i in range(count)]
    rows = [row | {"chosen_complete": False, "rejected_complete": False} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_training_turns_the_ranking_of_the_base_round(curves, tmp_path: Path, monkeypatch) -> None:
    """Held-out pairs prefer what training pairs prefer, and the base does not."""
    good, bad = "the cat sat", "a man and"
    write(tmp_path / "held.jsonl", 3, good, bad)
    held = curves.load_pairs(str(tmp_path / "held.jsonl")).pairs
    if (curves.margins(None, held, tmp_path / "first.json") > 0).any():
        good, bad = bad, good  # so that the base is wrong
    for name, count in (("helpful", 24), ("helpful-held-out", 3)):
        write(tmp_path / f"{name}.jsonl", count, good, bad)
    write(tmp_path / "helpful-held-out-whole.jsonl", 2, "the cat", "the cat sat")
    import train_arms

    monkeypatch.setattr(train_arms, "COMMON", train_arms.COMMON | {"learning_rate": 0.05, "checkpoint_every": 0})
    found = curves.curve("helpful", tmp_path, tmp_path / "work", [8, None])
    assert found["base"]["accuracy"] == 0.0
    assert found["shorter_whole"]["accuracy"] == 1.0
    assert found["held_out_pairs"] == 3
    few, many = found["points"]
    assert (few["pairs"], many["pairs"]) == (8, 24)
    assert few["arm_over_base"]["mean_margin"] > 0
    assert many["arm_over_base"]["accuracy"] == 1.0
    assert curves.curve("helpful", tmp_path, tmp_path / "work", [8, None])["points"] == found["points"], "kept"
    lines = curves.table({"helpful": found}).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| helpful | 8 | 3 | ")
    curves.plot({"helpful": found}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
