"""A guided tiny model with the demo's three ARMs, and an empty cache whose base is made at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stand_in

from genarm_fast import ARM, GenARM
from genarm_fast.demo import smollm2


@pytest.fixture(scope="session")
def model(tiny_model: Any, tokenizer: Any) -> GenARM:
    arms = [ARM(tiny_model(seed=i), name=name) for i, name in enumerate(("positive", "concise", "small"), 1)]
    return GenARM.from_pretrained(tiny_model(), arms, tokenizer=tokenizer, max_batch_size=8)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a cache folder that does not exist yet. No test that takes it downloads anything."""
    for name in ("download", "extract", "convert"):
        monkeypatch.setattr(smollm2, name, getattr(stand_in, name))
    monkeypatch.setenv("GENARM_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
