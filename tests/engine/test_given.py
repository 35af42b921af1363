"""Wrong arguments to an engine are refused in the caller's own thread and affect no other request."""

from __future__ import annotations

import math
from collections import deque

import pytest
from coroutines import PARAMS

from genarm_fast import GenARM
from genarm_fast.engine import scheduler
from genarm_fast.speculation import Speculation


def added(model, **options):
    (sequence,) = model.engine().add(model.prepare([5, 6], PARAMS, **options)[0])
    return sequence


def finished(model):
    while model.engine().scheduler:
        model.engine().step()


@pytest.fixture
def expected(model):
    return model.generate([5, 6], PARAMS)[0].token_ids


@pytest.fixture
def other(tiny_model, tokenizer):
    """A GenARM of one ARM."""
    return GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda engine, mine: engine.abort(None), TypeError, "sequences=None: expected a list of sequences"),
        (lambda engine, mine: engine.abort(mine), TypeError, "sequences=Sequence.*: expected a list of sequences"),
        (lambda engine, mine: engine.abort([mine, "x"]), TypeError, "got 'x' in it"),
        (lambda engine, mine: engine.steer(mine, (1.0,)), ValueError, r"weights=\(1.0,\): expected 2 numbers"),
        (lambda engine, mine: engine.steer(mine, (1.0, 2.0, 3.0)), ValueError, "expected 2 numbers, one per ARM"),
        (lambda engine, mine: engine.steer(mine, (math.nan, 1.0)), ValueError, "expected finite numbers, got nan"),
        (lambda engine, mine: engine.steer(mine, ((), 1.0)), ValueError, "expected a number for each token"),
        (lambda engine, mine: engine.steer(mine, "ab"), TypeError, "weights='ab': expected"),
        (lambda engine, mine: engine.steer("x", (1.0, 2.0)), TypeError, "got 'x' in it"),
        (lambda engine, mine: engine.run([mine]), ValueError, "expected new ones, got one that an engine has"),
        (lambda engine, mine: engine.run(None), TypeError, "sequences=None"),
        (lambda engine, mine: engine.add([1]), TypeError, r"request=\[1\]: expected one that `prepare` made"),
        (
            lambda engine, mine: engine.add(mine.request, "fast"),
            ValueError,
            'speculation=\'fast\': expected "auto", "off"',
        ),
        (lambda engine, mine: engine.add(mine.request, 3), ValueError, "speculation=3: expected"),
        (
            lambda engine, mine: engine.add(mine.request, Speculation("nobody")),
            ValueError,
            "drafter='nobody': expected one of",
        ),
    ],
)
def test_refused_to_its_caller_alone(model, expected, call, error, message):
    engine = model.engine()
    mine, neighbour = added(model), added(model)
    engine.step()
    with pytest.raises(error, match=message):
        call(engine, mine)
    finished(model)
    assert mine.tokens == neighbour.tokens == expected


def test_what_another_engine_has(model, other, expected):
    engine, theirs = model.engine(), added(other)
    other.engine().step()
    mine = added(model)
    for call in (lambda: engine.abort([theirs]), lambda: engine.steer(theirs, (1.0, 2.0))):
        with pytest.raises(ValueError, match="expected those of this engine"):
            call()
    with pytest.raises(ValueError, match="request: expected one for 2 ARMs"):
        engine.add(other.prepare([5, 6], PARAMS)[0])
    finished(model)
    finished(other)
    assert mine.tokens == expected
    assert theirs.tokens == other.generate([5, 6], PARAMS)[0].token_ids


def test_a_sequence_that_ended_is_not_run_again(model, expected):
    ended = added(model)
    finished(model)
    with pytest.raises(ValueError, match="expected new ones"):
        model.engine().run([ended])
    assert not model.engine().scheduler
    assert ended.tokens == expected


def test_weights_in_other_forms(model):
    """`steer` takes the forms of weights that `Stream.set_weights` takes."""
    for given in (2.0, [2.0, 2.0], {"a": 2.0, "b": 2.0}):
        sequence = added(model)
        model.engine().steer(sequence, given)
        finished(model)
        assert set(sequence.used_weights) == {(2.0, 2.0)}


@pytest.mark.parametrize("index", [True, 1.0, "a"])
def test_an_index_that_is_no_integer(model, index):
    with model.stream([[5, 6], [7]], PARAMS) as stream:
        for call in (lambda: stream.close(index), lambda: stream.set_weights(1.0, index)):
            with pytest.raises(TypeError, match=r"index=.*: expected 0\.\.1, one of the prompts"):
                call()
        assert sorted(chunk.index for chunk in stream) == [0] * 12 + [1] * 12


class Counted(deque):
    """A queue that counts how often it is searched."""

    looks = 0

    def __iter__(self):
        Counted.looks += 1
        return super().__iter__()

    def __contains__(self, each):
        Counted.looks += 1
        return super().__contains__(each)


@pytest.mark.parametrize("how", ["abort", "expire"])
def test_many_leave_in_one_look_at_the_queue(model, monkeypatch, how):
    """Removing 20,000 requests one by one from a queue of 40,000 took a minute."""
    engine = model.engine()
    staying = engine.add(model.prepare([5], PARAMS, n=50)[0])
    limit = 1e-9 if how == "expire" else None
    leaving = engine.add(model.prepare([6], PARAMS, n=200, max_time=limit)[0])
    monkeypatch.setattr(scheduler, "deque", Counted)
    engine.scheduler.waiting, Counted.looks = Counted(engine.scheduler.waiting), 0
    if how == "abort":
        engine.abort(leaving[::-1])
    else:
        engine.scheduler.leave(engine.scheduler.expired())
    assert Counted.looks <= 2
    assert list(engine.scheduler.waiting) == staying
    engine.abort(engine.scheduler.waiting)
    assert not engine.scheduler


def test_who_ended_in_a_step_that_fails_is_told(model, monkeypatch):
    """The request's time ended just before the step failed. Without this news an event loop would wait for it
    forever."""
    engine, news = model.engine(), []
    (late,) = model.prepare([5, 6], PARAMS, max_time=1e-9)[0].sequences(model.tokenizer)
    engine.join([late], news.append)

    def fails(*_):
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine.admission, "admit", fails)
    with pytest.raises(RuntimeError, match="device lost"):
        engine.step()
    assert (late.finish_reason, news) == ("time", [late])
    assert not engine._news


def test_the_end_of_its_time_is_no_round(model):
    (output,) = model.generate([5, 6], PARAMS, max_time=1e-9)
    assert (output.finish_reason, output.token_ids, output.rounds.rounds) == ("time", [], 0)


@pytest.mark.parametrize("speculation", ["auto", "off", Speculation(k=2)])
def test_ways_to_draft_are_those_of_generate(model, expected, speculation):
    engine = model.engine()
    (sequence,) = engine.add(model.prepare([5, 6], PARAMS)[0], speculation)
    finished(model)
    assert sequence.tokens == expected
