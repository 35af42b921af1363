"""`genarm-fast train`: its options are TrainConfig's fields, and with --json it prints nothing else."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from toy_pairs import toy_rows
from transformers import AutoTokenizer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from genarm_fast.cli import main
from genarm_fast.cli.train import add_arguments
from genarm_fast.train import TrainConfig, train

SWAP = {"prompt": "prompt", "chosen": "rejected", "rejected": "chosen"}
SWAPPED_ROW = {name: row[other] for row in toy_rows(1) for name, other in SWAP.items()}
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


def test_what_a_run_says(base: Path, toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A line each `log_every` steps has loss, accuracy, speed and the time left; the report counts dropped rows."""
    toy.write_text(toy.read_text() + '{"prompt": "q"}\n' + json.dumps(SWAPPED_ROW) + "\n")
    argv = ["train", str(base), str(toy), "--output", str(tmp_path / "arm"), *RUN]
    assert main([*argv, "--log-every", "2"]) == 2
    assert "line 49: field 'chosen' is missing" in capfd.readouterr().err
    assert main([*argv, "--log-every", "2", "--on-bad-row", "drop"]) == 0
    shown = capfd.readouterr().err
    steps = re.findall(
        r"^step (\d)/5: loss \d\.\d{3}, accuracy [01]\.\d{3}, [\d.]+ pairs/s, \d+ tokens/s, 0:00:\d\d left$",
        shown,
        re.M,
    )
    assert steps == ["1", "2", "4"]
    dropped = json.loads((tmp_path / "arm" / "report.json").read_text())["data"]["dropped"]
    assert dropped == {"malformed row": 1, "also there with chosen and rejected swapped, kept": 1}


def test_logs_go_where_trainer_sends_them(
    base: Path, toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["train", str(base), str(toy), "--output", str(tmp_path / "arm"), *RUN, "--report-to", "tensorboard"]
    monkeypatch.setattr("genarm_fast.train.checks.get_available_reporting_integrations", lambda: [])
    assert main(argv) == 2
    assert "report_to=('tensorboard',): 'tensorboard' is unknown to transformers or not" in capfd.readouterr().err
    logged: list[dict[str, float]] = []

    class Board(TrainerCallback):
        def on_log(self, args: object, state: object, control: object, logs: dict[str, float], **_: object) -> None:
            logged.append(logs)

    monkeypatch.setattr("genarm_fast.train.checks.get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Board)
    assert main(argv) == 0
    assert {"loss", "train_accuracy", "pairs_per_second"} <= set(logged[0])


def test_json_is_all_there_is(base: Path, toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(base), str(toy), "--output", str(tmp_path / "arm"), *RUN, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["final"]["pairs"] == 12


@pytest.mark.parametrize("form", ["text", "chat", "template", "transcript", "transcript as chat"])
def test_score_sees_what_training_saw(
    base: Path, write_jsonl: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], form: str
) -> None:
    """The command reads the same prompts and ends of answers, so rewards agree, also where answers end with another
    token than EOS."""
    shutil.copytree(base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    end = tokenizer("~")["input_ids"][0]
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "~")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end]}))
    rows = [*toy_rows(24), {"prompt": "q", "chosen": "the sea", "rejected": "and cut", "rejected_complete": False}]
    if form.startswith("transcript"):
        starts = [f"\n\nHuman: {row['prompt']}\n\nAssistant:" for row in rows]
        rows = [
            {**row, "prompt": None, "chosen": f"{start} {row['chosen']}", "rejected": f"{start} {row['rejected']}"}
            for row, start in zip(rows, starts)
        ]
    held = str(write_jsonl(rows, "held.jsonl"))
    how = {"template": ["--prompt-template", "<s>Q: {prompt} A:"], "chat": ["--as-chat"]}
    how["transcript as chat"] = how["chat"]
    options = ["--dtype", "float32", "--save-dtype", "float32", "--batch-size", "4", "--learning-rate", "0.02"]
    arm = str(tmp_path / "arm")
    argv = ["train", str(tmp_path / "base"), held, "--eval-data", held, "--output", arm, *options, *how.get(form, [])]
    assert main([*argv, "--json"]) == 0
    final = json.loads(capfd.readouterr().out)["final"]
    argv = ["score", "--base", str(tmp_path / "base"), "--arm", arm, "--input", held, "--dtype", "float32", "--json"]
    assert main(argv) == 0
    found = json.loads(capfd.readouterr().out)["summary"]["arm"]
    for name, value in found.items():
        assert value == pytest.approx(final[name], rel=1e-4, abs=1e-5), name


def test_a_chat_template_is_a_file(base: Path, toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Other commands take a file too. If the name were taken for the template, it would be every prompt."""
    argv = ["train", str(base), str(toy), "--output", str(tmp_path / "arm"), *RUN, "--as-chat", "--chat-template"]
    assert main([*argv, "chat.jinja"]) == 2
    assert "chat.jinja" in capfd.readouterr().err
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    assert main([*argv, str(tmp_path / "chat.jinja")]) == 0
    assert json.loads((tmp_path / "arm" / "genarm.json").read_text())["chat_template"] == template


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
    """The base's name is looked up once, not file by file."""

    def unreachable(url: str, token: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("genarm_fast.models.hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_: pytest.fail("goes on"))
    with pytest.raises(FileNotFoundError, match=r"base='typo': expected .* the hub can't be reached: no network"):
        train(TrainConfig(base="typo", data=str(toy), output=str(tmp_path / "arm")))
