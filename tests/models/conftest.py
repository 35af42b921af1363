"""Folders of a model and of an adapter, for tests to damage."""

from __future__ import annotations

import pytest
from tiny_models import build_model, build_tokenizer, save_adapter


@pytest.fixture
def base(tmp_path):
    build_model("llama", 0).save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path, base):
    save_adapter(tmp_path / "adapter", base=base, seed=1)
    return tmp_path / "adapter"
