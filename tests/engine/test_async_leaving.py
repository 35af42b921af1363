"""Tasks and streams that end early, slow readers, and loops that close: no other request waits for them."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from coroutines import PARAMS, leave_by_break, run, tokens_of, until

from genarm_fast import SamplingParams


@pytest.fixture
def model(one_arm):
    return one_arm


def test_cancelling_a_task_frees_its_slot(model, slow_steps):
    """The slot is free after the current step, and the other tasks continue."""
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
    assert set(indices[2:]) == {1}  # chunks of prompt 0 may have arrived already
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


async def leave_by_aclose(stream):
    await stream.__anext__()
    await stream.aclose()
    assert stream.output.finish_reason == "cancelled"
    assert [chunk async for chunk in stream] == []


def test_a_stream_is_closed_from_another_loop(model, slow_steps):
    """The other loop cannot wait for the stream's end, but the slot becomes free."""

    async def main():
        stream = model.astream([5, 6], PARAMS, max_new_tokens=200)
        await anext(stream)
        with pytest.raises(RuntimeError, match="closed, but its end can be waited for in the event loop in which"):
            await asyncio.to_thread(run, stream.aclose())
        await until(lambda: not model.engine().scheduler)
        return [chunk async for chunk in stream]

    assert run(main()) == []


@pytest.mark.parametrize("index", [True, "0", 0.0])
def test_an_index_that_is_no_integer(model, index):
    async def main():
        async with model.astream([[5, 6], [7]], PARAMS) as stream:
            with pytest.raises(TypeError, match=r"index=.*: expected 0\.\.1, one of the prompts"):
                await stream.aclose(index)

    run(main())


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
    """A stream runs exactly `ahead` chunks ahead of its reader while other requests end. The reader gets all tokens
    later."""
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
    """The blocked loop's reader was about to ask for a chunk. The steps of other requests wait once for it, for 2
    ms."""
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


@pytest.mark.parametrize("ahead", [0, 3])
def test_the_end_of_its_time_comes_without_a_reader(model, ahead):
    """The slot becomes free in time although no request steps. The reader finds its chunks and the reason for their
    end."""
    engine, limit = model.engine(), 0.4

    async def main():
        start = time.perf_counter()
        stream = model.astream([5, 6], PARAMS, ahead=ahead, max_time=limit)
        chunks = [await anext(stream)]
        await until(lambda: len(engine.scheduler.placed) == 1 and engine.scheduler.placed[0].held)
        await until(lambda: not engine.scheduler)
        assert limit <= time.perf_counter() - start < limit + 0.3
        return [*chunks, *[chunk async for chunk in stream]], stream.output

    chunks, output = run(main())
    assert [chunk.finish_reason for chunk in chunks] == [None] * (1 + ahead) + ["time"]
    assert "".join(chunk.text for chunk in chunks) == output.text
    expected = model.generate([5, 6], PARAMS)[0].token_ids[: 1 + ahead]
    assert output.token_ids == [token for chunk in chunks for token in chunk.token_ids] == expected
    assert output.finish_reason == "time"


def test_the_end_of_its_time_where_others_are_read(model):
    """One of two prompts in a stream runs out of time unread; an `agenerate` beside the stream is not held up."""
    engine = model.engine()

    async def main():
        params = [PARAMS.override(max_time=0.2), PARAMS]
        stream = model.astream([[5, 6], [7, 8]], params)
        await anext(stream)
        await until(lambda: any(each.finish_reason == "time" for each in stream._call.sequences))
        (left,) = engine.scheduler.placed
        assert left.request.index == 1
        other = (await model.agenerate([9], PARAMS))[0].token_ids
        rest = [chunk async for chunk in stream]
        return other, [chunk.finish_reason for chunk in rest if chunk.index == 0][-1], stream.outputs

    other, reason, (late, whole) = run(main())
    assert (reason, late.finish_reason, whole.finish_reason) == ("time", "time", "length")
    expected = [model.generate(prompt, PARAMS)[0].token_ids for prompt in ([7, 8], [9])]
    assert [whole.token_ids, other] == expected


def test_a_stream_that_nobody_reads_leaves_before_it_is_in_the_way(model):
    """Without an event loop no thread watches the clock, so the caller who wants the memory checks the time limit."""
    with model.stream([5, 6], PARAMS, max_time=0.1) as stream:
        next(stream)
        time.sleep(0.11)
        model.release()
        assert model.workspace_bytes == 0
        assert [chunk.finish_reason for chunk in stream] == ["time"]
    with model.stream([5, 6], PARAMS, max_time=0.1) as stream:
        next(stream)
        time.sleep(0.11)
        model.warm_up()
        assert stream.output.finish_reason == "time"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_loop_that_is_closed_with_requests_open(model, slow_steps, streamed):
    """The slots of requests that nobody can read any more are freed."""
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
