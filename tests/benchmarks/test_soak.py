"""The soak test, at a size for tests; docs/decoding.md has a real one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from /proc")


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("soak")


def test_tokens_are_right(soak):
    counted = []
    found = soak.soak(60, batch_size=4, advance=counted.append)
    assert sum(counted) == found["requests"] == 60
    assert found["compared"] == 4
    assert found["different"] == 0
    assert found["completions"] > 60
    assert found["resident MiB at the end"] - found["resident MiB after the first group"] < 64


@pytest.mark.usefixtures("neighbourly_noise")
def test_wrong_ones_are_counted(soak, monkeypatch):
    """This is the negative control."""
    monkeypatch.setattr(soak, "COMPARED", 10)
    assert soak.soak(20)["different"] > 0


def test_slope(soak):
    assert soak.slope([(0, 5), (10, 25), (20, 45)]) == pytest.approx(2)
    assert soak.slope([(50, 7)]) == 0
    before = soak.resident_bytes()
    kept = torch.ones(2**24)
    assert soak.resident_bytes() - before == pytest.approx(kept.nbytes, rel=0.1)
