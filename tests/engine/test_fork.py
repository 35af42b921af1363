"""A forked process has only one thread, so it must not wait for a thread that exists only in its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest
from coroutines import PARAMS

from genarm_fast import GenARM, functional
from genarm_fast.engine.step import Steps


@pytest.fixture
def model(one_arm):
    return one_arm


def in_a_fork(answer):
    """Whether `answer` returns True in a child process within 20 s."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(20)
            code = 0 if answer() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def in_mid_step(model, monkeypatch):
    """Return a thread that stops in the middle of a step, the event that it is there, and the event that lets it
    continue."""
    entered, leave, launch = threading.Event(), threading.Event(), Steps.launch

    def held(self, *rest):
        if threading.current_thread() is stepping:
            entered.set()
            assert leave.wait(60)
        return launch(self, *rest)

    monkeypatch.setattr(Steps, "launch", held)
    stepping = threading.Thread(target=lambda: model.generate([7, 8], PARAMS))
    return stepping, entered, leave


@pytest.mark.parametrize("asynchronous", [False, True])
def test_while_another_thread_steps(model, in_mid_step, asynchronous):
    expected = model.generate([5, 6], PARAMS)[0].token_ids
    stepping, entered, leave = in_mid_step
    open_stream = model.stream([5, 6], PARAMS)

    def answer():
        with pytest.raises(RuntimeError, match="forked in the middle of a step: expected a new call"):
            next(open_stream)
        open_stream.close()
        if asynchronous:
            return asyncio.run(model.agenerate([5, 6], PARAMS))[0].token_ids == expected
        return model.generate([5, 6], PARAMS)[0].token_ids == expected

    stepping.start()
    try:
        assert entered.wait(60)
        assert in_a_fork(answer)
    finally:
        leave.set()
        stepping.join()
    assert [token for chunk in open_stream for token in chunk.token_ids] == expected  # the parent's stream continues


def test_between_steps(model):
    """A stream continues in both processes; new calls do not decode what others began."""
    expected = model.generate([5, 6], PARAMS)[0].token_ids
    with model.stream([5, 6], PARAMS) as stream:
        begun = next(stream).token_ids

        def answer():
            mine = model.generate([5, 6], PARAMS)[0].token_ids
            alone = not model.engine().scheduler
            return alone and mine == expected == begun + [token for chunk in stream for token in chunk.token_ids]

        assert in_a_fork(answer)
        assert begun + [token for chunk in stream for token in chunk.token_ids] == expected


def test_while_another_thread_loads(tiny_model, tokenizer, monkeypatch):
    entered, leave, load = threading.Event(), threading.Event(), GenARM.from_pretrained.__func__

    def held(cls, *args, **options):
        if threading.current_thread() is loading:
            entered.set()
            assert leave.wait(60)
        return load(cls, *args, **options)

    def call():
        return functional.generate(tiny_model(seed=3), (), [5, 6], PARAMS, tokenizer=tokenizer)[0].token_ids

    monkeypatch.setattr(GenARM, "from_pretrained", classmethod(held))
    loading = threading.Thread(target=call)
    functional.release()
    loading.start()
    try:
        assert entered.wait(60)
        assert in_a_fork(lambda: len(call()) == PARAMS.max_new_tokens)
    finally:
        leave.set()
        loading.join()
        functional.release()
