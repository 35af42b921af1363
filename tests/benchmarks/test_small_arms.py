"""Small ARMs of several sizes: how they are recognised, their rows, and the curve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

SHARE = {"value": 0.25, "low": 0.125, "high": 0.5}


@pytest.fixture
def small_arms(script):
    return script("small_arms")


def folder_of(small_arms, path: Path, parameters: int, *, shape: bool = False) -> Path:
    """Make a folder like the shipped one that records this number of parameters. shape: copy the weights too."""
    shipped = small_arms.demo.arm("small")
    if shape:
        shutil.copytree(shipped, path)
    path.mkdir(exist_ok=True)
    about = json.loads((shipped / "genarm.json").read_text())
    about["distilled"] |= {"parameters": parameters, "response_tokens": 1234}
    (path / "genarm.json").write_text(json.dumps(about))
    return path


def test_sizes_are_told_from_their_folders(small_arms, tmp_path: Path) -> None:
    folder = folder_of(small_arms, tmp_path / "one", 3_470_000)
    assert small_arms.name_of(folder) == "small-3.5M"
    found = small_arms.described([folder])
    assert list(found) == ["small ARM, w = 1", "small-3.5M ARM, w = 1"]
    ours, shipped = found["small-3.5M ARM, w = 1"], found["small ARM, w = 1"]
    assert (ours["parameters"], ours["distilled_tokens"]) == (3_470_000, 1234)
    assert shipped["distilled_tokens"] == 2_600_142
    assert shipped["kl"] == pytest.approx(2.05, abs=0.1)
    assert (ours["pairs"], ours["accuracy"]) == (80, shipped["accuracy"])
    (tmp_path / "two").mkdir()
    for wrong in (tmp_path / "two", small_arms.demo.arm("positive"), tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"expected a folder of train_small.py, with `distilled`"):
            small_arms.info(wrong)


def test_a_size_is_a_row_an_input_and_a_member(small_arms, script, tmp_path: Path) -> None:
    """The row runs only that ARM: a copy of the shipped ARM draws the same tokens as the shipped ARM."""
    methods = script("quality_methods")
    folder = folder_of(small_arms, tmp_path / "one", 9_000_000, shape=True)
    models = methods.Models({}, None, small=[folder])
    rows = methods.weak(models)
    assert set(rows) - set(methods.weak(methods.Models({}, None))) == {"small-9.0M ARM, w = 1"}
    assert models.inputs()["small-9.0M"] == models.inputs()["ARM small"] is not None
    prompts, params = [[504, 216, 2683], [1031, 28, 96]], script("baselines.interface").Params(6)
    found = {name: rows[name](prompts, params) for name in ("small-9.0M ARM, w = 1", "small ARM, w = 1", "base")}
    ours, shipped, base = ([each.tokens for each in responses] for responses in found.values())
    assert ours == shipped != base
    assert [dict(each.forwards) for each in found["small-9.0M ARM, w = 1"]] == [{"base": 6, "small-9.0M": 6}] * 2
    with pytest.raises(ValueError, match="expected ARMs of different sizes"):
        methods.Models({}, None, small=[folder, folder])


def test_the_command_refuses_other_folders(script, monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["quality.py", "weak", "--small", str(tmp_path)])
    with pytest.raises(SystemExit):
        script("quality").main()
    assert f"--small: {tmp_path}: expected a folder of train_small.py" in capsys.readouterr().err


def result(small_arms, extra: bool = True) -> dict:
    score = {"value": 0.6, "low": 0.5, "high": 0.7}
    row = {"score": score, "cpu_ms_per_token": 8.6, "share of guided, w = 1": SHARE, "share of policy": None}
    arm = {"distilled_tokens": 300_000, "kl": 3.0, "pairs": 80, "accuracy": 0.8, "standard_error": 0.05}
    sizes = {small_arms.SHIPPED: arm | {"parameters": 9_771_040, "distilled_tokens": 2_600_142}}
    if extra:
        sizes |= {small_arms.row_of(f"small-{n}M"): arm | {"parameters": int(n * 1e6)} for n in (23.3, 3.5, 9.8)}
    methods = {"policy": {}, "guided, w = 1": {}} | dict.fromkeys(sizes, row)
    return {"small_arms": sizes, "methods": methods}


def test_table(small_arms) -> None:
    titles, _, *lines = small_arms.table(result(small_arms)).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| 3.5 M", "| 9.8 M", "| 23.3 M", "| 9.8 M (ships)"]
    assert "| share of guided, w = 1 | share of policy |" in titles
    wanted = "| 2,600,142 tokens | 3.00 | 0.800 ± 0.098 | 0.60 [0.50, 0.70] | 0.25 [0.12, 0.50] | no gap | 9 |"
    assert lines[-1].endswith(wanted)
    assert len(small_arms.table(result(small_arms, extra=False)).splitlines()) == 3


@pytest.mark.parametrize("extra", [True, False])
def test_plot(small_arms, tmp_path: Path, extra: bool) -> None:
    small_arms.plot(result(small_arms, extra), tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 1000
