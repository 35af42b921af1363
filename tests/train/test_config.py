"""TrainConfig refuses options that cannot work, by name."""

from __future__ import annotations

from typing import Any

import pytest

from genarm_fast.train import TrainConfig


def config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"base": "b", "data": "d", "output": "o", **options})


def test_defaults_are_the_published_ones() -> None:
    """GenARM's HH run has β_r 0.05, rate 5e-4, batch 32, one epoch, cosine, LoRA r 8, α 16, dropout 0.05."""
    c = config()
    assert (c.beta, c.learning_rate, c.batch_size, c.epochs, c.schedule) == (0.05, 5e-4, 32, 1.0, "cosine")
    assert (c.lora_rank, c.lora_alpha, c.lora_dropout, c.weight_decay) == (8, 16.0, 0.05, 0.05)


def test_accepts_integers_as_numbers() -> None:
    assert config(epochs=2, warmup=100).epochs == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base": ""}, ValueError, "base='': expected a non-empty string"),
        ({"beta": 0.0}, ValueError, "beta=0.0: expected a number above 0"),
        ({"beta": "0.1"}, TypeError, "beta='0.1': expected float"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate=nan: expected a finite number"),
        ({"epochs": True}, TypeError, "epochs=True: expected float"),
        ({"seed": 1.5}, TypeError, "seed=1.5: expected int"),
        ({"seed": -1}, ValueError, "seed=-1: expected at least 0"),
        ({"seed": 2**32}, ValueError, r"seed=4294967296: expected less than 2\*\*32"),
        ({"max_pairs": 0}, ValueError, "max_pairs=0: expected at least 1"),
        ({"holdout_every": 1}, ValueError, "holdout_every=1: expected at least 2"),
        ({"holdout_fraction": 1.0}, ValueError, r"holdout_fraction=1.0: expected a number in \[0, 1\)"),
        (
            {"batch_size": 10, "micro_batch_size": 4},
            ValueError,
            "batch_size=10: expected a multiple of micro_batch_size=4",
        ),
        ({"method": "qlora"}, ValueError, "method='qlora': expected one of lora, full"),
        ({"dtype": "fp4"}, ValueError, "dtype='fp4': expected one of auto, float32, bfloat16, float16"),
        ({"columns": ("prompt=a", "prompt=b")}, ValueError, "columns=.*: expected each NAME once"),
        ({"prompt_template": "Q:"}, ValueError, r"prompt_template='Q:': expected a text with \{prompt\}"),
        ({"prompt_template": "{prompt}", "as_chat": True}, ValueError, "as_chat=True: expected False when"),
        ({"chat_template": "chat.jinja"}, ValueError, "chat_template='chat.jinja': expected the text of a Jinja"),
        ({"eval_data": "e", "holdout_every": 5}, ValueError, "holdout_every=5: expected None when eval_data is given"),
        ({"method": "full", "lora_targets": ("q",)}, ValueError, r"lora_targets=\('q',\): expected none with"),
        ({"lora_targets": "q_proj"}, TypeError, r"lora_targets='q_proj': expected tuple\[str, ...\]"),
        ({"as_chat": 1}, TypeError, "as_chat=1: expected bool"),
        (
            {"chat_template_kwargs": [1]},
            TypeError,
            r"chat_template_kwargs=\[1\]: expected a mapping that JSON can hold",
        ),
        ({"chat_template_kwargs": {"a": print}}, TypeError, "chat_template_kwargs=.*: expected a mapping that JSON"),
        ({"chat_template_kwargs": {1: 2}}, TypeError, "chat_template_kwargs={1: 2}: expected a mapping that JSON"),
        ({"chat_template_kwargs": {"tokenize": 1}}, ValueError, "chat_template_kwargs='tokenize': expected what only"),
        ({"data_id": 3}, TypeError, "data_id=3: expected str | None"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        config(**options)
