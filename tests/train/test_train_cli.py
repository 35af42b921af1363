"""`genarm-fast train`: options are TrainConfig's fields, and nothing else is printed with --json."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path

import pytest

from genarm_fast.cli import main
from genarm_fast.train import TrainConfig, train
from genarm_fast.train.cli import add_arguments

RUN = ["--dtype", "float32", "--batch-size", "8", "--holdout-every", "4"]


def parse(*argv: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return vars(parser.parse_args(argv))


def test_every_field_is_an_option_with_its_default() -> None:
    args = parse("base", "data", "--output", "out")
    assert args.pop("json") is False
    assert args == {f.name: f.default for f in fields(TrainConfig)} | {"base": "base", "data": "data", "output": "out"}


def test_types() -> None:
    options = "--lora-targets q_proj v_proj --epochs 2 --max-pairs 5 --as-chat --eval-data held"
    args = parse("base", "data", "--output", "out", *options.split())
    assert (args["lora_targets"], args["epochs"], args["max_pairs"]) == (["q_proj", "v_proj"], 2.0, 5)
    assert (args["as_chat"], args["eval_data"]) == (True, "held")


def test_trains(base: Path, toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["train", str(base), str(toy), "--output", str(tmp_path / "arm"), *RUN]
    assert main(argv) == 0
    shown = capfd.readouterr()
    assert "accuracy on 12 held-out pairs:" in shown.out
    assert "loss" in shown.err
    assert main([*argv, "--json"]) == 0
    shown = capfd.readouterr()
    assert json.loads(shown.out) == json.loads((tmp_path / "arm" / "report.json").read_text())


def test_json_is_all_there_is(base: Path, toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(base), str(toy), "--output", str(tmp_path / "arm"), *RUN, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["final"]["pairs"] == 12


def test_bad_options_exit_with_two(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(base), "nowhere.jsonl", "--output", str(tmp_path / "arm"), "--beta", "0"]) == 2
    assert "beta=0.0: expected a number above 0" in capfd.readouterr().err
    assert not (tmp_path / "arm").exists()


def test_wrong_places_exit_with_two(base: Path, toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "./no-model", str(toy), "--output", str(tmp_path / "arm"), *RUN]) == 2
    assert "base='./no-model': expected a folder or a hub id" in capfd.readouterr().err
    assert main(["train", str(base), str(toy), "--output", str(toy), *RUN]) == 2
    assert f"output='{toy}': expected a new or empty folder" in capfd.readouterr().err


def test_a_base_that_is_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toy: Path) -> None:
    """Is not asked for file by file."""

    def unreachable(url: str, token: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("genarm_fast.sources.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_: pytest.fail("goes on"))
    with pytest.raises(FileNotFoundError, match=r"base='typo': expected .* the hub can't be reached: no network"):
        train(TrainConfig(base="typo", data=str(toy), output=str(tmp_path / "arm")))
