"""Tasks of event loops: `agenerate` and `astream` over one engine thread."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from doubles import Lagging, engines_on
from tiny_models import build_model

from genarm_fast import GenARM, GenerationError, SamplingParams, demo
from genarm_fast.engine import engine_thread
from genarm_fast.engine.step import Steps

PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True, seed=1)


@pytest.fixture
def model(tiny_model, tokenizer):
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


def run(coroutine, seconds=60):
    """What it gives; fails instead of hanging."""
    return asyncio.run(asyncio.wait_for(coroutine, seconds))


async def until(condition, seconds=20):
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end
        await asyncio.sleep(0.001)


async def tokens_of(stream):
    return [token async for chunk in stream for token in chunk.token_ids]


def raising(input_ids, scores):
    raise LookupError("no such token")


def test_agenerate_equals_generate(model):
    prompts = ["the cat", [5, 6], [{"role": "user", "content": "that"}]]
    params = {"n": 2, "logprobs": 1, "rewards": True, "stop": ["e"]}
    expected = model.generate(prompts, PARAMS, **params)
    for shown in (False, True):
        outputs = run(model.agenerate(prompts, PARAMS, progress=shown, **params))
        assert [output.completions for output in outputs] == [output.completions for output in expected]
        assert [output.prompt for output in outputs] == prompts


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("device", [None, Lagging])
def test_astream_equals_stream(model, ahead, device):
    """Chunk by chunk; several prompts, of which the shorter ones end before."""
    prompts, params = ["the cat", [5, 6], "that"], [PARAMS.override(max_new_tokens=4 + 3 * i) for i in range(3)]

    async def chunks_of(stream):
        return [chunk async for chunk in stream], stream.outputs

    def compare():
        with model.stream(prompts, params) as stream:
            expected = list(stream)
        chunks, outputs = run(chunks_of(model.astream(prompts, params, ahead=ahead)))
        assert [output.completions for output in outputs] == [output.completions for output in stream.outputs]
        for index in range(3):
            assert [c for c in chunks if c.index == index] == [c for c in expected if c.index == index]

    if device is None:
        compare()
    else:
        with engines_on(device()):
            compare()


@pytest.mark.parametrize("ahead", [None, 0, 2])
def test_16_tasks_share_steps(model, slow_steps, ahead):
    """Each gets its own tokens, in little more steps than one of them takes."""
    seeds = range(16)
    expected = [model.generate("the cat", PARAMS, seed=seed)[0].token_ids for seed in seeds]
    slow_steps.clear()

    async def one(seed):
        if ahead is None:
            return (await model.agenerate("the cat", PARAMS, seed=seed))[0].token_ids
        return await tokens_of(model.astream("the cat", PARAMS, seed=seed, ahead=ahead))

    async def together():
        return await asyncio.gather(*map(one, seeds))

    assert run(together()) == expected
    assert len(slow_steps) <= 3 * PARAMS.max_new_tokens  # 12 where all come at once


def test_tasks_share_steps_with_threads_and_other_loops(model, slow_steps):
    params = PARAMS.override(max_new_tokens=30)
    expected = model.generate("the cat", params)[0].token_ids
    slow_steps.clear()

    async def tasks():
        outputs = await asyncio.gather(*(model.agenerate("the cat", params) for _ in range(3)))
        return [output.token_ids for (output,) in outputs]

    async def stream():
        return [await tokens_of(model.astream("the cat", params))]

    calls = [lambda: run(tasks()), lambda: run(stream()), lambda: [model.generate("the cat", params)[0].token_ids]] * 2
    with ThreadPoolExecutor(6) as pool:
        found = [tokens for future in [pool.submit(call) for call in calls] for tokens in future.result(60)]
    assert found == [expected] * 10
    assert len(slow_steps) < 10 * 30 / 2
    assert max(map(len, slow_steps)) > 3


def test_weights_count_from_the_next_chunk_on(model):
    """Also those that are set before the first one, and by two calls at a time."""

    async def steered():
        async with model.astream([5, 6, 7], PARAMS) as stream:
            stream.set_weights(0.25)
            seen = 0
            async for _ in stream:
                seen += 1
                if seen == 4:
                    stream.set_weights({"arm": 2.0}, index=0)
                    stream.set_weights([-1.0])
            with pytest.raises(ValueError, match="expected 1"):
                stream.set_weights([1.0, 2.0])
            with pytest.raises(IndexError, match="index=1"):
                stream.set_weights(1.0, index=1)
        return stream.output

    output = run(steered())
    assert output.completions[0].weights == [(0.25,)] * 4 + [(-1.0,)] * 8
    stream = model.stream([5, 6, 7], PARAMS)
    stream.set_weights(0.25)
    for count, _ in enumerate(stream, 1):
        if count == 4:
            stream.set_weights(-1.0)
    assert output.completions == stream.output.completions


def test_weights_by_name_add_up(model, tiny_model, tokenizer):
    """Two changes within one step: the second one knows of the first, in streams of either kind."""
    several = GenARM.from_pretrained(tiny_model(), [tiny_model(seed=1), tiny_model(seed=2)], tokenizer=tokenizer)
    first, second = several.arm_names

    def steer(input_ids, scores):
        if input_ids.shape[1] == 2 + 3:
            streams[-1].set_weights({first: 3.0})
            streams[-1].set_weights({second: 4.0})
        return scores

    async def asynchronous():
        async with several.astream([5, 6], PARAMS, logits_processors=[steer]) as stream:
            streams.append(stream)
            await tokens_of(stream)
        return stream.output

    streams = [several.stream([5, 6], PARAMS, logits_processors=[steer])]
    list(streams[0])
    for output in (streams[0].output, run(asynchronous())):
        assert output.completions[0].weights == [(1.0, 1.0)] * 4 + [(3.0, 4.0)] * 8


def test_cancelling_a_task_frees_its_slot(model, slow_steps):
    """After the step that runs; the others go on."""
    engine = model.engine()

    async def main():
        long = PARAMS.override(max_new_tokens=200)
        task, other = (asyncio.create_task(model.agenerate([5, 6], long, seed=seed)) for seed in (1, 2))
        await until(lambda: len(engine.scheduler.running) == 2 and len(slow_steps) > 5)
        (mine,) = (each for each in engine.scheduler.running if each.seed == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        steps = len(slow_steps)
        await until(lambda: mine.slot == -1)
        assert len(slow_steps) <= steps + 1
        assert mine.finish_reason == "cancelled"
        assert not other.done()
        return (await other)[0]

    output = run(main())
    assert output.token_ids == model.generate([5, 6], PARAMS, seed=2, max_new_tokens=200)[0].token_ids
    assert not engine.scheduler


def test_one_prompt_of_a_stream_is_closed(model, slow_steps):
    params = SamplingParams(seed=5, max_new_tokens=12, ignore_eos=True)
    whole = [output.token_ids for output in model.generate([[5, 6], [7, 8]], params)]

    async def main():
        stream = model.astream([[5, 6], [7, 8]], params)
        with pytest.raises(RuntimeError, match="aclose: expected the stream to have begun"):
            await stream.aclose(0)
        await anext(stream), await anext(stream)
        await stream.aclose(0)
        with pytest.raises(IndexError, match=r"index=2: expected 0\.\.1"):
            await stream.aclose(2)
        indices = [chunk.index async for chunk in stream]
        return indices, stream.outputs

    indices, outputs = run(main())
    assert set(indices[2:]) == {1}  # one of the first may be there already
    assert [output.finish_reason for output in outputs] == ["cancelled", "length"]
    assert outputs[0].token_ids == whole[0][: len(outputs[0].token_ids)]
    assert (len(outputs[0].token_ids) < 12, outputs[1].token_ids) == (True, whole[1])


def test_all_prompts_of_a_stream_are_closed_one_by_one(model, slow_steps):
    async def main():
        async with model.astream([[5, 6], [7, 8]], PARAMS, max_new_tokens=200) as stream:
            await anext(stream)
            await stream.aclose(0)
            await stream.aclose(1)
            assert len([chunk async for chunk in stream]) <= 4
            return stream.outputs

    assert [output.finish_reason for output in run(main())] == ["cancelled", "cancelled"]
    assert not model.engine().scheduler


async def leave_by_break(stream):
    async for _ in stream:
        break


async def leave_by_aclose(stream):
    await stream.__anext__()
    await stream.aclose()
    assert stream.output.finish_reason == "cancelled"
    assert [chunk async for chunk in stream] == []


async def leave_by_with(stream):
    async with stream:
        await stream.__anext__()


async def leave_by_timeout(stream):
    await stream.__anext__()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(stream.__anext__(), 1e-5)


async def leave_before_it_begins(stream):
    await stream.aclose()
    with pytest.raises(RuntimeError, match="at its end"):
        _ = stream.output


@pytest.mark.parametrize(
    "leave", [leave_by_break, leave_by_aclose, leave_by_with, leave_by_timeout, leave_before_it_begins]
)
def test_an_abandoned_stream_leaves(model, slow_steps, leave):
    engine = model.engine()

    async def main():
        await leave(model.astream([5, 6], PARAMS, max_new_tokens=200))
        await until(lambda: not engine.scheduler)

    run(main())
    assert not engine._news


@pytest.mark.parametrize("ahead", [0, 4])
def test_a_slow_reader_holds_up_nobody(model, slow_steps, ahead):
    """It is so many chunks ahead of its reader and no more, while others end, and gets all its tokens later."""
    engine = model.engine()

    async def main():
        slow = model.astream([5, 6], PARAMS, ahead=ahead)
        first = await slow.__anext__()
        (output,) = await model.agenerate([7, 8], PARAMS, max_new_tokens=30)
        assert len(output.token_ids) == 30
        (held,) = engine.scheduler.placed
        assert len(held.tokens) == 1 + ahead
        return first.token_ids + await tokens_of(slow)

    assert run(main()) == model.generate([5, 6], PARAMS)[0].token_ids


def test_a_blocked_loop_holds_up_no_other(model, slow_steps):
    """Its reader was about to ask; the steps of others wait for that once, for 2 ms."""
    blocked, done = threading.Event(), threading.Event()

    async def blocking():
        async for _ in model.astream([5, 6], PARAMS):
            blocked.set()
            done.wait(30)

    async def other():
        return await model.agenerate([7, 8], PARAMS, max_new_tokens=40)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(run, blocking())
        assert blocked.wait(30)
        before = len(slow_steps)
        assert len(run(other())[0].token_ids) == 40
        assert len(slow_steps) - before >= 39
        done.set()
        reading.result(60)


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


def test_context_variables_reach_processors(model):
    """Of the caller, whichever thread steps for it."""
    name, seen = contextvars.ContextVar("name"), []

    def processor(input_ids, scores):
        seen.append((name.get(), threading.current_thread() is threading.main_thread()))
        return scores

    async def one(value):
        name.set(value)
        await model.agenerate([5, 6], PARAMS, max_new_tokens=2, logits_processors=[processor])
        async for _ in model.astream([5, 6], PARAMS, max_new_tokens=2, logits_processors=[processor]):
            assert name.get() == value

    async def main():
        await asyncio.gather(one("a"), one("b"))

    run(main())
    assert sorted(seen) == [("a", False)] * 4 + [("b", False)] * 4
    name.set("sync")
    model.generate([5, 6], PARAMS, max_new_tokens=1, logits_processors=[processor])
    assert seen[-1] == ("sync", True)


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
    """As by `generate`: no sequence has a slot yet, and the error is raised as it is."""
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


def test_sequences_that_somebody_else_aborts(model, slow_steps):
    engine = model.engine()

    async def main():
        task = asyncio.create_task(model.agenerate([5, 6], PARAMS, max_new_tokens=200))
        await until(lambda: engine.scheduler.running)
        engine.abort(list(engine.scheduler.running))
        return (await task)[0]

    assert run(main()).finish_reason == "cancelled"


def test_max_time(model, slow_steps):
    output = run(model.agenerate([5, 6], PARAMS, max_new_tokens=200, max_time=0.2))[0]
    assert output.finish_reason == "time"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_loop_that_is_closed_with_requests_open(model, slow_steps, streamed):
    """Nobody reads them any more: their slots are freed."""
    engine, loop, kept = model.engine(), asyncio.new_event_loop(), []

    async def begin():
        long = PARAMS.override(max_new_tokens=240)
        if streamed:
            kept.append(model.astream([5, 6], long, ahead=3))
            await kept[0].__anext__()
        else:
            kept.append(asyncio.ensure_future(model.agenerate([5, 6], long)))
            await until(lambda: engine.scheduler.running)

    loop.run_until_complete(begin())
    loop.close()
    run(until(lambda: not engine.scheduler))
    assert len(slow_steps) < 240
    assert len(run(model.agenerate([5, 6], PARAMS))[0].token_ids) == 12
    if not streamed:
        kept[0]._log_destroy_pending = False


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
    """At once, and without a garbage collection: no cycle holds it."""
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
    """The thread is in C++ then; it ends its step first."""
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


def test_the_example_of_the_docs(tiny_model, tokenizer, tmp_path, monkeypatch):
    """With tiny models in place of the real ones."""
    for name, seed in (("base", 0), ("small", 1)):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.setattr(demo, "base", lambda: tmp_path / "base")
    monkeypatch.setattr(demo, "arm", lambda name: tmp_path / name)
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    program = page.split("## asyncio")[1].split("```python")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(program.replace("print(asyncio.run", "found = (asyncio.run"), names)
    texts, streamed = names["found"]
    assert len(texts) == 2
    assert isinstance(streamed, str)
