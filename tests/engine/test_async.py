"""`agenerate` and `astream` in tasks of event loops, over one engine thread."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from coroutines import PARAMS, run, tokens_of
from doubles import Lagging, engines_on

from genarm_fast import GenARM, demo


@pytest.fixture
def model(one_arm):
    return one_arm


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
    """The chunks are equal, for several prompts of which the shorter ones end first."""
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
    """Each task gets its own tokens, in little more steps than one task takes."""
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
    assert len(slow_steps) <= 3 * PARAMS.max_new_tokens  # 12 if all tasks arrive at once


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
    """Weights set before the first chunk count too, and so do two calls at one point."""

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
    """Weights change twice within one step: the second change keeps the first's weights, in both kinds of streams."""
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


def test_context_variables_reach_processors(model):
    """Processors see the caller's context variables, whichever thread steps."""
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


def test_the_example_of_the_docs(tiny_model, tokenizer, tmp_path, monkeypatch):
    """The example in docs/api.md runs, with tiny models in place of the real ones."""
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
