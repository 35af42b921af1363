"""A curve over training pairs: what is trained and ranked, on a tiny model."""

from __future__ import annotations

import argparse
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
    monkeypatch.setattr(module.demo, "arm_names", lambda: ["harmless"])  # no other ARM that ships is ranked
    return module


@pytest.mark.parametrize(
    ("text", "pairs", "settings", "name"),
    [
        ("0", None, {}, "all"),
        ("512", 512, {}, "512"),
        ("512:epochs=3,method=full", 512, {"epochs": 3, "method": "full"}, "512-epochs=3-method=full"),
        ("0:gradient_checkpointing=false", None, {"gradient_checkpointing": False}, "all-gradient_checkpointing=false"),
    ],
)
def test_points_of_the_command_line(curves, text: str, pairs: int | None, settings: dict[str, Any], name: str) -> None:
    point = curves.Point.parse(text)
    assert (point.pairs, point.settings, point.name) == (pairs, settings, name)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("few", "expected PAIRS or PAIRS:NAME=VALUE"),
        ("-1", "expected PAIRS or PAIRS:NAME=VALUE"),
        ("512:epochs", "'epochs': expected NAME=VALUE"),
        ("512:epochs=0", "epochs=0: expected a number above 0"),
        ("512:epochs=many", "epochs='many': expected"),
        ("512:speed=1", "unexpected keyword argument 'speed'"),
    ],
)
def test_malformed_points_are_told_before_anything_is_trained(curves, text: str, complaint: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=complaint):
        curves.Point.parse(text)


def test_a_changed_setting_reaches_the_training(curves, tmp_path: Path) -> None:
    """With all weights trained instead of LoRA, the model is ranked as a whole, not as an adapter."""
    for name, count in (("helpful", 8), ("helpful-held-out", 3), ("helpful-held-out-whole", 2)):
        write(tmp_path / f"{name}.jsonl", count, "the cat sat", "a man and")
    wanted = [curves.Point(4, "method=full,learning_rate=0.05,dtype=float32")]
    found = curves.curve("helpful", tmp_path, tmp_path / "work", wanted)
    (point,) = found["points"]
    assert point["changes"] == wanted[0].changes
    assert not list((tmp_path / "work" / f"helpful-{wanted[0].name}").glob("adapter*"))
    assert abs(point["arm_over_base"]["mean_margin"]) > 0
    assert "| 4 | `method=full`, `learning_rate=0.05`, `dtype=float32` |" in curves.table({"helpful": found})
    assert curves.usual(found) == []


def test_labels_that_would_lie_over_each_other_are_one(curves) -> None:
    assert curves.near([32, 128, 256, 1693, 1727, 2100]) == [[32], [128], [256], [1693, 1727], [2100]]


def write(path: Path, count: int, good: str, bad: str) -> None:
    rows = [{"prompt": f"say {i}", "chosen": good, "rejected": bad} for i in range(count)]
    rows = [row | {"chosen_complete": False, "rejected_complete": False} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_training_turns_the_ranking_of_the_base_round(curves, tmp_path: Path, monkeypatch) -> None:
    """Held-out pairs prefer what training pairs prefer, and the base prefers the opposite."""
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
    found = curves.curve("helpful", tmp_path, tmp_path / "work", [curves.Point(8), curves.Point(None)])
    assert found["base"]["accuracy"] == 0.0
    assert found["shorter_whole"]["accuracy"] == 1.0
    assert found["shipped"] is None, "no ARM for helpfulness ships"
    assert found["held_out_pairs"] == 3
    few, many = found["points"]
    assert (few["pairs"], many["pairs"]) == (8, 24)
    assert few["arm_over_base"]["mean_margin"] > 0
    assert many["arm_over_base"]["accuracy"] == 1.0
    assert many["gain"] == {"value": many["arm"]["accuracy"], "standard_error": 0.0}
    assert (
        curves.curve("helpful", tmp_path, tmp_path / "work", [curves.Point(8), curves.Point(None)])["points"]
        == found["points"]
    ), "kept"
    lines = curves.table({"helpful": found}).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| helpful | 8 |  | 3 | ")
    curves.plot({"helpful": found}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_gains_are_pair_by_pair_and_the_arm_that_ships_is_ranked(curves, tmp_path: Path, monkeypatch) -> None:
    """By hand: of four pairs the base has two right; the ARM keeps one of these and wins another one."""
    write(tmp_path / "harmless-held-out.jsonl", 4, "the cat sat", "a man and")
    write(tmp_path / "harmless-held-out-whole.jsonl", 4, "the cat", "the cat sat")
    made = {"base": [1.0, 2.0, -1.0, -2.0], "8": [0.5, -1.0, 3.0, -1.0], "shipped": [1.0, 2.0, 3.0, 4.0]}
    asked = []

    def margins(adapter: Path | None, pairs: list[Any], kept: Path) -> torch.Tensor:
        asked.append(adapter)
        return torch.tensor(made[kept.stem.rpartition("-")[2]])

    report = {"data": {"train_pairs": 8}, "steps": 1, "seconds": 1.0}
    monkeypatch.setattr(curves, "margins", margins)
    monkeypatch.setattr(curves, "trained", lambda *_: report)
    found = curves.curve("harmless", tmp_path, tmp_path / "work", [curves.Point(8)])
    assert asked == [None, tmp_path / "work/harmless-8", curves.demo.arm("harmless")]
    (point,) = found["points"]
    assert (point["arm"]["accuracy"], point["arm_over_base"]["accuracy"], found["base"]["accuracy"]) == (0.5, 0.5, 0.5)
    assert point["gain"]["value"] == 0.0
    # Standard error of the changes 0, -1, 1, 0.
    assert point["gain"]["standard_error"] == pytest.approx((2 / 3) ** 0.5 / 2)
    assert found["shipped"]["gain"]["value"] == 0.5
    line = curves.table({"harmless": found}).splitlines()[-1]
    assert line.startswith("| harmless | the ARM that ships |  | 4 | 1.000 ± 0.000 | 0.500 ± 0.490 | +0.500 ± 0.566 |")
