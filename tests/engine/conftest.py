"""What tests of event loops share: a model, and steps that take long enough for others to come meanwhile."""

from __future__ import annotations

import time

import pytest

from genarm_fast import GenARM
from genarm_fast.engine.step import Steps


@pytest.fixture
def one_arm(tiny_model, tokenizer):
    """A new GenARM, with a thread of its own for event loops."""
    return GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer)


@pytest.fixture
def slow_steps(monkeypatch):
    """The batch of every step; each takes 5 ms, so that others come meanwhile."""
    batches, launch = [], Steps.launch

    def slowly(self, batch, *rest):
        batches.append(batch)
        time.sleep(0.005)
        return launch(self, batch, *rest)

    monkeypatch.setattr(Steps, "launch", slowly)
    return batches
