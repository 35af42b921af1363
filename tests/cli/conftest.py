"""Fixtures for the command line: tiny models in folders, and a way to run a command in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from genarm_fast.cli import main


class Models(NamedTuple):
    """Folders of a base and an ARM; `options` load the base with two ARMs."""

    base: Path
    arm: Path
    options: list[str]


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> Models:
    root = tmp_path_factory.mktemp("models")
    folders = [root / "base", root / "arm"]
    for seed, folder in enumerate(folders):
        tiny_model(seed=seed, max_position_embeddings=512).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    base, arm = folders
    return Models(base, arm, ["--base", str(base), "--arm", f"one:{arm}=1.5", "--arm", f"two:{base}=-0.25"])


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """cli("generate", ...): returns exit code, stdout, stderr."""

    def run(*argv: str) -> Result:
        capfd.readouterr()
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as stop:  # argparse raises SystemExit for its errors and --help
            code = int(stop.code or 0)
        return Result(code, *capfd.readouterr())

    return run
