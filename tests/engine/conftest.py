"""Fixtures for tests of event loops: a model, and steps slow enough for other requests to arrive during one."""

from __future__ import annotations

import time

import pytest

from genarm_fast import GenARM
from genarm_fast.engine.step import Steps


@pytest.fixture
def one_arm(tiny_model, tokenizer):
    """A new GenARM, with its own engine thread for event loops."""
    return GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer)


@pytest.fixture
def slow_steps(monkeypatch):
    """Make each step take 5 ms, so that other requests arrive meanwhile; return the list of the steps' batches."""
    batches, launch = [], Steps.launch

    def slowly(self, batch, *rest):
        batches.append(batch)
        time.sleep(0.005)
        return launch(self, batch, *rest)

    monkeypatch.setattr(Steps, "launch", slowly)
    return batches
