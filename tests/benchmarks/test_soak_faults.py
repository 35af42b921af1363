"""The soak test with faults, for 15 seconds; `make soak` runs it for any time."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from /proc")


@pytest.fixture
def soak_faults(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("soak_faults")


def test_answers_are_right_whatever_happens_beside_them(soak_faults):
    found = soak_faults.soak_faults(15.0, threads=3)
    assert found["wrong"] == 0, found["first wrong"]
    assert min(found[name] for name in ("compared", "requests", "streams", "forks")) > 0
    before, after = found["descriptors, a quarter and the end"]
    assert after <= before + 2
    before, after = found["threads, a quarter and the end"]
    assert after <= before


@pytest.mark.usefixtures("neighbourly_noise")
def test_wrong_ones_are_counted(soak_faults):
    """This is the negative control."""
    assert soak_faults.soak_faults(5.0, threads=3)["wrong"] > 0
