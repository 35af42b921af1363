"""Calls of event loops that fail or are made in the wrong place, and what a call leaves behind."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
from coroutines import PARAMS, leave_by_break, raising, run, tokens_of, until
from tiny_models import build_model

from genarm_fast import GenARM, GenerationError
from genarm_fast.engine import engine_thread
from genarm_fast.engine.step import Steps


@pytest.fixture
def model(one_arm):
    return one_arm


def test_errors_reach_their_caller_alone(model, slow_steps):
    async def main():
        bad = model.agenerate([[5, 6], [7]], [PARAMS.override(logits_processors=[raising]), PARAMS])
        bad_stream = tokens_of(model.astream([5, 6], PARAMS, logits_processors=[raising]))
        good = model.agenerate([8, 9], PARAMS)
        return await asyncio.gather(bad, bad_stream, good, return_exceptions=True)

    failed, stream_failed, (good,) = run(main())
    assert good.token_ids == model.generate([8, 9], PARAMS)[0].token_ids
    for error in (failed, stream_failed):
        assert isinstance(error, GenerationError)
        assert str(error) == "prompts[0]: no such token"
        assert isinstance(error.__cause__, LookupError)
    assert failed.outputs[0] is None
    assert failed.outputs[1].token_ids == model.generate([7], PARAMS)[0].token_ids


@pytest.mark.parametrize("raised", [asyncio.CancelledError, SystemExit, GeneratorExit, KeyboardInterrupt])
def test_a_processor_that_raises_what_ends_tasks_and_processes(model, slow_steps, raised):
    """Only the processor's own request fails: signals never reach the engine's thread, so none raised this."""

    def ending(input_ids, scores):
        raise raised

    async def main():
        good = asyncio.create_task(model.agenerate([8, 9], PARAMS))
        bad = model.agenerate([5, 6], PARAMS, logits_processors=[ending])
        return await asyncio.gather(good, bad, return_exceptions=True)

    (good,), bad = run(main())
    assert good.token_ids == model.generate([8, 9], PARAMS)[0].token_ids
    assert isinstance(bad, GenerationError)
    assert "ending at 0x" in str(bad)
    assert str(bad).endswith(f"raised {raised.__name__}: ")
    assert isinstance(bad.__cause__.__cause__, raised)


def test_what_signals_raise_ends_a_call_of_the_main_thread(model):
    def ending(input_ids, scores):
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        model.generate([5, 6], PARAMS, logits_processors=[ending])
    assert not model.engine().scheduler


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("", {}), ValueError, r"prompts\[0\]=''"),
        (("a", {"temperature": -1}), ValueError, "temperature=-1"),
        (("a", {"speculation": "often"}), ValueError, "speculation"),
        (("a", {"no_such_thing": 1}), TypeError, "no_such_thing"),
    ],
)
def test_wrong_arguments(model, arguments, error, message):
    prompt, options = arguments
    with pytest.raises(error, match=message):
        run(model.agenerate(prompt, **options))
    with pytest.raises(error, match=message):
        run(tokens_of(model.astream(prompt, **options)))


def test_wrong_arguments_of_streams(model):
    with pytest.raises(ValueError, match="n=2: expected 1"):
        run(tokens_of(model.astream("a", n=2)))
    with pytest.raises(ValueError, match="ahead=-1: expected an integer >= 0"):
        model.astream("a", ahead=-1)
    with pytest.raises(RuntimeError, match="expected the stream to have begun"):
        model.astream("a").set_weights(1.0)


def test_a_stream_has_one_reader_in_one_loop(model, slow_steps):
    async def main():
        stream = model.astream([5, 6], PARAMS)
        await stream.__anext__()
        first = asyncio.create_task(stream.__anext__())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task waits"):
            await stream.__anext__()
        await first
        return stream

    stream = run(main())
    with pytest.raises(RuntimeError, match="expected the event loop in which it began"):
        run(stream.__anext__())


def test_a_failing_step_fails_those_in_it(model, monkeypatch):
    launch, calls = Steps.launch, []

    def fail_once(self, *rest):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("device lost")
        return launch(self, *rest)

    monkeypatch.setattr(Steps, "launch", fail_once)
    with pytest.raises(GenerationError, match="the step that decoded it failed: RuntimeError: device lost"):
        run(model.agenerate([5, 6], PARAMS))
    assert len(run(model.agenerate([5, 6], PARAMS))[0].token_ids) == 12


def test_weights_that_moved_are_refused(tokenizer):
    """The error is raised unchanged, as by `generate`: no sequence has a slot yet."""
    base = build_model("llama", 0)
    model = GenARM.from_pretrained(base, build_model("llama", 1), tokenizer=tokenizer)
    expected = run(model.agenerate([5, 6], PARAMS))[0].token_ids
    weight = base.model.layers[0].mlp.up_proj.weight
    before, weight.data = weight.data, weight.data.clone()
    with pytest.raises(RuntimeError, match="was moved"):
        run(model.agenerate([[5, 6], [7]], PARAMS))
    with pytest.raises(RuntimeError, match="was moved"):
        run(tokens_of(model.astream([5, 6], PARAMS)))
    weight.data = before
    assert run(model.agenerate([5, 6], PARAMS))[0].token_ids == expected


def test_a_processor_may_not_wait_for_its_own_step(model):
    def ask(input_ids, scores):
        asyncio.run(model.agenerate([8, 9], PARAMS))
        return scores

    with pytest.raises(GenerationError, match="in the middle of a step of this thread: expected `generate`"):
        run(model.agenerate([5, 6], PARAMS, logits_processors=[ask]))
    with pytest.raises(GenerationError, match="in the middle of a step of this thread: expected `generate`"):
        model.generate([5, 6], PARAMS, logits_processors=[ask])


def test_a_processor_may_generate(model):
    found = []

    def ask(input_ids, scores):
        found.append(model.generate([8, 9], PARAMS)[0].token_ids)
        return scores

    run(model.agenerate([5, 6], PARAMS, max_new_tokens=2, logits_processors=[ask]))
    assert found == [model.generate([8, 9], PARAMS)[0].token_ids] * 2


def test_nothing_of_a_call_is_kept(model):
    class Processor:
        def __call__(self, input_ids, scores):
            return scores

    processor = Processor()
    alive = weakref.ref(processor)
    run(model.agenerate([5, 6], PARAMS, logits_processors=[processor]))
    run(leave_by_break(model.astream([5, 6], PARAMS, logits_processors=[processor])))
    del processor
    run(until(lambda: gc.collect() is not None and alive() is None))
    assert model._thread.running


def test_a_dropped_model_is_freed_and_its_thread_ends(tiny_model, tokenizer):
    """The model is freed at once, without a garbage collection: no cycle holds it."""
    model = GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer)
    run(model.agenerate([5, 6], PARAMS))
    run(tokens_of(model.astream([5, 6], PARAMS)))
    thread, dead = model._thread, weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert dead() is None
        run(until(lambda: not thread.running))
    finally:
        gc.enable()


def test_an_idle_thread_ends_and_another_one_begins(model, monkeypatch):
    monkeypatch.setattr(engine_thread, "IDLE_SECONDS", 0.01)
    first = run(model.agenerate([5, 6], PARAMS))[0].token_ids
    run(until(lambda: not model._thread.running))
    assert run(model.agenerate([5, 6], PARAMS))[0].token_ids == first


def test_the_interpreter_ends_in_mid_generation():
    """The thread runs C++ code when the interpreter ends; it finishes its step first."""
    program = """
        import asyncio, sys, threading
        from tiny_models import build_model, build_tokenizer
        from genarm_fast import GenARM

        model = GenARM.from_pretrained(build_model("llama", 0), tokenizer=build_tokenizer())
        begun = threading.Event()

        async def main():
            async for _ in model.astream([5, 6], max_new_tokens=200, ignore_eos=True, ahead=10**6):
                begun.set()
                await asyncio.sleep(60)

        threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
        begun.wait()
        print("leaving")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "leaving"), done.stderr
