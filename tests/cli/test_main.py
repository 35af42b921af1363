"""The command itself: help without torch, exit codes, one-line errors."""

from __future__ import annotations

import errno
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

import genarm_fast
from genarm_fast import SamplingParams
from genarm_fast.cli.loading import ArmSpec, arm_spec
from genarm_fast.cli.options import numbers

Cli = Callable[..., SimpleNamespace]


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["score"], ["bench"], ["train"]])
def test_help_imports_neither_torch_nor_transformers(command: list[str]) -> None:
    code = (
        "import sys; from genarm_fast.cli import main\n"
        f"try: main({[*command, '--help']!r})\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_version(cli: Cli) -> None:
    assert cli("--version") == (0, f"genarm-fast {genarm_fast.__version__}\n", "")
    done = subprocess.run(
        [sys.executable, "-m", "genarm_fast", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"genarm-fast {genarm_fast.__version__}\n"


def test_every_sampling_parameter_is_an_option_with_its_help(cli: Cli) -> None:
    text = " ".join(cli("generate", "--help").out.split())
    for field in fields(SamplingParams):
        option = "--" + field.name.replace("_", "-")
        assert (option in text) == (field.name != "logits_processors")
    assert "keep the k most probable tokens; 0 keeps all (default: 0)" in text
    assert "(default: 128)" in text
    assert "(default: 512)" in cli("chat", "--help").out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["generat"], "invalid choice"),
        (["generate", "hi"], "required: --base"),
        (["generate", "hi", "--base", "x", "--top-p", "1.5"], r"error: top_p=1.5: expected a number in (0, 1]"),
        (["generate", "hi", "--base", "x", "--weights", "1,x"], "'1,x': expected a finite number"),
        (["generate", "hi", "--base", "x", "--weights", "1,2"], "expected 0 numbers, one per ARM, got 2"),
        (["generate", "hi", "--base", "x", "--logit-bias", "5"], "'5': expected ID=BIAS"),
        (["generate", "hi", "--base", "./no/such/model"], "./no/such/model: expected a model's folder"),
        (["generate", "hi", "--base", "demo", "--arm", "demo:nope"], "name='nope': expected one of the shipped ARMs"),
        (["generate", "hi", "--base", "x", "--arm", "y=nan"], "'y=nan': expected a finite number after '='"),
        (
            ["generate", "hi", "--base", "x", "--temperature", "hot"],
            "argument --temperature: invalid float value: 'hot'",
        ),
        (["score", "--bass", "x", "--base", "y"], "genarm-fast score: error: unrecognized arguments: --bass x"),
        (
            ["serve", "--base", "x", "--arm", "y", "--plan", "-tp", "x"],
            "argument --tensor-parallel-size/-tp: invalid int",
        ),
        (["generate", "hi", "--base", "x", "--arm", "a/y=2", "--weights", "z=2"], "weights: 'z': expected 'y'"),
        (["chat", "--base", "x", "--arm", "n:a/y", "--weights", "y=2"], "weights: 'y': expected 'n'"),
        (["generate", "hi", "--base", "x", "--input", "f"], "--input and --output: expected both"),
        (["generate", "hi", "--base", "x", "--overwrite"], "--overwrite: expected --input"),
        (["generate", "hi", "--base", "x", "--stream", "--json"], "--stream: expected neither"),
        (["generate", "--prompt-file", "/no/such/file", "--base", "x"], "/no/such/file"),
        (["generate", "--prompt-file", "f", "hi", "--base", "x"], "expected no PROMPT"),
        (["generate", "--chat", "--raw", "hi", "--base", "x"], "not allowed with"),
        (["score", "--base", "x"], "expected --prompt and --response, or --input alone"),
        (["score", "--base", "x", "--prompt", "a", "--input", "f"], "or --input alone"),
        (["score", "--base", "x", "--input", "/no/such/file"], "/no/such/file"),
    ],
)
def test_usage_errors_are_one_line_and_exit_with_2(cli: Cli, argv: list[str], message: str) -> None:
    code, out, err = cli(*argv)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


def test_names_near_a_shipped_arm(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(url: str, token: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("genarm_fast.models.hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, _, err = cli("generate", "hi", "--base", str(tmp_path), "--arm", "positve=2")
    assert code == 2
    assert "arms[0]='positve': expected a folder or a hub id" in err
    assert err.endswith("; is demo:positive meant?\n")
    (tmp_path / "small").mkdir()
    monkeypatch.chdir(tmp_path)
    err = cli("generate", "hi", "--base", "nowhere", "--arm", "small", "--arm", "nothing-of-the-kind").err
    assert "base='nowhere': expected" in err
    assert "meant" not in err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("top_k=-1:\n  expected more"), 2, "genarm-fast generate: error: top_k=-1: expected more"),
        (RuntimeError("out of memory"), 1, "genarm-fast generate: error: out of memory"),
        (KeyError("x"), 1, "genarm-fast generate: error: KeyError: 'x' (--debug shows where)"),
        (OSError(28, "No space left on device"), 1, "genarm-fast generate: error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "genarm-fast generate: interrupted"),
    ],
)
def test_run_time_errors(cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr("genarm_fast.cli.generate.run", fail)
    result = cli("generate", "hi", "--base", "x")
    assert (result.code, result.out, result.err.strip()) == (code, "", line)


def test_warnings_are_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(args: object) -> int:
        warnings.warn("taken unchecked", stacklevel=1)
        return 0

    monkeypatch.setattr("genarm_fast.cli.generate.run", warn)
    assert cli("generate", "hi", "--base", "x") == (0, "", "genarm-fast: warning: taken unchecked\n")


def test_debug_shows_the_traceback(cli: Cli) -> None:
    with pytest.raises(ValueError, match="top_p"):
        cli("generate", "hi", "--base", "x", "--top-p", "2", "--debug")


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("org/model", ArmSpec("org/model", 1.0, None)),
        ("org/model=1.5", ArmSpec("org/model", 1.5, None)),
        ("./arm=-2e-1", ArmSpec("./arm", -0.2, None)),
        ("good:./arm=2", ArmSpec("./arm", 2.0, "good")),
        ("demo:positive=1.5", ArmSpec("demo:positive", 1.5, None)),
        ("good:demo:positive", ArmSpec("demo:positive", 1.0, "good")),
    ],
)
def test_arm_specification(text: str, spec: ArmSpec) -> None:
    assert arm_spec(text) == spec


def test_an_existing_folder_may_have_an_equals_sign(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lr=3e-4").mkdir()
    monkeypatch.chdir(tmp_path)
    assert arm_spec("lr=3e-4") == ArmSpec("lr=3e-4", 1.0, None)
    assert arm_spec("lr=3e-4=2") == ArmSpec("lr=3e-4", 2.0, None)


def test_weights_may_begin_with_a_minus(cli: Cli) -> None:
    assert numbers("-1,0.5") == (-1.0, 0.5)
    err = cli("generate", "hi", "--base", "x", "--weights", "-1,0.5").err  # argparse has accepted the value
    assert "weights=(-1.0, 0.5): expected 0 numbers" in err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "out.jsonl"), 2, "symbolic links: 'out.jsonl'"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, "File name too long"),
        (OSError(errno.EIO, "Input/output error", "x"), 1, "Input/output error"),
        (MemoryError(), 1, "error: out of memory\n"),
        (MemoryError("220 tokens take 9 bytes of cache"), 1, "error: out of memory: 220 tokens"),
    ],
)
def test_exit_codes_of_what_the_system_says(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, said: str
) -> None:
    def fails(_: object) -> int:
        raise error

    monkeypatch.setattr("genarm_fast.cli.generate.run", fails)
    result = cli("generate", "hi", "--base", "b")
    assert (result.code, said in result.err) == (code, True)
