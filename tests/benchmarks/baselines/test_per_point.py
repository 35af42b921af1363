"""A policy per point: pairs in the point's shares, and a training that learns both objectives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

pytest.importorskip("trl")


def rows(kind: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"say {i}", "chosen": f"the {kind} {i}", "rejected": f"a man {i}"} for i in range(count)]


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[list[Any], list[Any]]:
    from baselines.pairs import split

    for kind, count in (("cat", 30), ("sea", 12)):
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(kind, count)))
    return split(tmp_path / "cat.jsonl", 3)[0], split(tmp_path / "sea.jsonl", 3)[0]


@pytest.mark.parametrize(
    ("share", "count", "of_first"),
    [(0.5, None, 8), (0.0, None, 0), (1.0, None, 20), (0.75, None, 20), (0.9, None, 20), (0.75, 4, 3), (0.3, 10, 3)],
)
def test_pairs_are_mixed_in_the_shares(pairs, share: float, count: int | None, of_first: int) -> None:
    from baselines.per_point import mixed, most

    first, second = pairs
    assert (len(first), len(second)) == (20, 8)
    found = mixed(first, second, share, count)
    assert len(found) == (count or most(20, 8, share))
    assert sum("cat" in str(pair.chosen) for pair in found) == of_first == round(share * len(found))
    assert len({str(pair.chosen) for pair in found}) == len(found), "no pair twice"
    assert mixed(first, second, share, count) == found


def test_the_most_pairs_of_a_share() -> None:
    from baselines.per_point import most

    assert [most(20, 8, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [8, 11, 16, 27, 20]
    assert most(0, 8, 0.5) == 1  # round(0.5 · 1) is 0: one pair of the second objective


@pytest.mark.parametrize(
    ("share", "count", "said"),
    [
        (-0.1, None, r"share=-0.1: expected a number from 0 to 1"),
        (float("nan"), None, r"share=nan: expected a number from 0 to 1"),
        (0.5, 17, r"count=17: expected 1 to 16, of 20 and 8 pairs at share=0.5"),
        (0.5, 0, r"count=0: expected 1 to 16"),
    ],
)
def test_shares_and_counts_that_do_not_fit(pairs, share: float, count: int | None, said: str) -> None:
    from baselines.per_point import mixed

    with pytest.raises(ValueError, match=said):
        mixed(*pairs, share, count)


def test_the_command(pairs, tmp_path: Path, tiny_model, tokenizer, monkeypatch, capsys) -> None:
    """After the training, held-out pairs of both objectives are ranked right; the base does not rank them so."""
    from baselines import per_point

    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    paths = [str(tmp_path / name) for name in ("base", "cat.jsonl", "out")]
    options = ["--second", str(tmp_path / "sea.jsonl"), "--share", "0.5", "--holdout-every", "3"]
    quick = ["--epochs", "12", "--batch", "4", "--learning-rate", "2e-2"]
    monkeypatch.setattr("sys.argv", ["per_point.py", *paths, *options, *quick])
    per_point.main()
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["share"], report["pairs"], report["of_first"], report["held_out_pairs"]) == (0.5, 16, 8, 14)
    for name in ("held_out", "held_out_second"):
        assert report[name]["policy over base"]["accuracy"] > 0.9, report[name]
        assert report[name]["base"]["accuracy"] < 0.9, report[name]
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
    assert "held out second, right of 4 pairs by policy " in capsys.readouterr().out

    monkeypatch.setattr("sys.argv", ["per_point.py", *paths, *options, "--max-pairs", "99"])
    with pytest.raises(SystemExit):
        per_point.main()
    assert "count=99: expected 1 to 16" in capsys.readouterr().err
