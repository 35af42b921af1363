"""The policy of a run: the speculation that was asked for, and the tuner's choices by the run's drafter indices."""

from __future__ import annotations

import pytest

from genarm_fast.speculation.config import Speculation
from genarm_fast.speculation.observations import PLAIN, Choice, StepObservation
from genarm_fast.speculation.policy import DraftPolicy, Tuners
from genarm_fast.speculation.tuner import Tuner

NAMES = [("one", "two"), ("ngram",), ("base",)]


@pytest.mark.parametrize(
    ("speculation", "expected"),
    [
        (Speculation("two", 3), Choice(0, 3)),
        (Speculation("base", 2), Choice(2, 2)),
        (Speculation(k=4), Choice(0, 4)),
        (Speculation(k=0), PLAIN),
        (Speculation("draft_model", 3), PLAIN),
    ],
)
def test_what_was_asked_for_is_done_and_nothing_is_learnt(speculation: Speculation, expected: Choice) -> None:
    tuners = Tuners()
    policy = DraftPolicy(speculation, NAMES, tuners, ahead=False)
    policy.observe(StepObservation(expected.drafter, 1, expected.k, [expected.k], [0], 1.0, 1.0))
    assert policy.choose(1) == expected
    assert policy.tuner_candidates == policy.shadow_due() == []
    assert tuners.stats() == []


def test_the_tuner_knows_only_drafters_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third drafter of the run is the first of the tuner, in choices and in observations."""
    tuners = Tuners()
    policy = DraftPolicy(Speculation("base"), NAMES, tuners, ahead=False)
    assert policy.tuner_candidates == policy.shadow_due() == [2]
    assert policy.choose(1) == PLAIN
    monkeypatch.setattr(Tuner, "choose", lambda self, rows: Choice(0, 5))
    assert policy.choose(1) == Choice(2, 5)
    policy.observe(StepObservation(2, 2, 5, [5, 1], [2, 1], 1.0, 1.0))
    policy.observe(StepObservation(None, 2, 0, [0, 0], [0, 0], 0.0, 1.0))
    (stats,) = tuners.stats()
    assert stats["steps"] == {"plain": 1, "base, k=5": 1}
    assert stats["drafters"]["base"]["accepted"] == [2, 1, 0, 0, 0, 0, 0, 0]


def test_guesses_are_judged_by_the_tokens_of_the_step() -> None:
    """Guesses count up to the first wrong one and never beyond a row's tokens. Rows without tokens tell nothing."""
    tuners = Tuners()
    policy = DraftPolicy(Speculation(), NAMES, tuners, ahead=False)
    policy.observe_shadow(1, [[5, 6, 7], [5, 9, 7], [8], [5, 6]], [[5, 6], [5, 6, 7], [], [5]], seconds=0.25)
    found = tuners.stats()[0]["drafters"]["ngram"]
    assert found["drafted"][:3] == [3, 2, 0]
    assert found["accepted"][:3] == [3, 1, 0]
    assert found["draft_seconds"] == {"3.17": 0.25}


def test_runs_with_the_same_drafters_share_a_tuner() -> None:
    tuners = Tuners()
    shared = tuners.get(["a", "b"], 8, False)
    assert tuners.get(["a", "b"], 8, False) is shared
    assert all(tuners.get(*other) is not shared for other in ((["a"], 8, False), (["a", "b"], 4, False)))
    assert tuners.get(["a", "b"], 8, True).ahead
    assert len(tuners.stats()) == 4
