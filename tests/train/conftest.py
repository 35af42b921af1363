"""Fixtures for training tests: a tiny base on disk, and preferences that it can learn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from toy_pairs import toy_rows
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from genarm_fast.train import TrainConfig


@pytest.fixture(scope="session")
def base(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model(hidden_size=16, max_position_embeddings=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quick_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip drawing the curve, which takes half the time of a tiny run and has its own test."""
    monkeypatch.setattr("genarm_fast.train.artifacts.curve", lambda history, title: Figure((1, 1)))


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """write_jsonl(rows, name="pairs.jsonl"): writes the rows and returns the path."""

    def write(rows: Iterable[dict[str, Any]], name: str = "pairs.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def toy(write_jsonl: Callable[..., Path]) -> Path:
    return write_jsonl(toy_rows(48))


@pytest.fixture
def make_config(base: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """make_config(data, **options): the options of a run of a second."""

    def make(data: Path | str, **options: Any) -> TrainConfig:
        defaults = {
            "output": str(tmp_path / "arm"),
            "dtype": "float32",
            "batch_size": 8,
            "learning_rate": 0.01,
            "holdout_every": 4,
            "eval_every": 0,
            "log_every": 1,
            "checkpoint_every": 0,
        }
        return TrainConfig(base=str(base), data=str(data), **{**defaults, **options})

    return make
