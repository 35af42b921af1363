"""Sequences join and leave while the engine runs: through `add`, `abort` and `step`, and from several threads."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from against_reference import random_params, random_prompts
from doubles import Lagging, engines_on
from tiny_models import build_model

from genarm_fast import GenARM, SamplingParams
from genarm_fast.engine import scheduler
from genarm_fast.engine.step import Steps
from genarm_fast.speculation.config import OFF, Speculation

PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True, seed=1)


@pytest.fixture
def guided(tiny_model, tokenizer):
    """A function that returns a new GenARM of a base and an ARM at each call."""
    return lambda **options: GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer, **options)


def request(model, prompt, params=PARAMS, **overrides):
    (made,) = model.prepare([prompt], params, **overrides)
    return made


def tokens_alone(model, prompts, params):
    return [model.generate(prompt, each)[0].token_ids for prompt, each in zip(prompts, params)]


@pytest.mark.parametrize("device", [None, Lagging])
@pytest.mark.parametrize("speculation", [OFF, Speculation("arm", 2)])
def test_200_requests_at_random_times(guided, device, speculation):
    """Each request gets the tokens that it gets alone, whatever runs beside it, and every request ends."""
    rng = random.Random(5)
    model = guided(max_batch_size=8)
    prompts = random_prompts(rng, 200, 30)
    params = [SamplingParams(**random_params(rng, 1), seed=rng.getrandbits(64)) for _ in prompts]
    expected = tokens_alone(guided(), prompts, params)

    def decode():
        engine, found, left = model.engine(), {}, list(range(200))
        while left or engine.scheduler:
            for _ in range(min(len(left), rng.choice([0, 0, 1, 1, 3]))):
                index = left.pop(0)
                (found[index],) = engine.add(request(model, prompts[index], params[index]), speculation)
            advanced = engine.step()
            assert all(sequence.slot == -1 for sequence in advanced if sequence.ended)
            assert len(engine.scheduler.placed) <= 8
        return [found[index].tokens for index in range(200)]

    if device is None:
        assert decode() == expected
    else:
        with engines_on(device()):
            assert decode() == expected


@pytest.mark.parametrize("device", [None, Lagging])
def test_abort_frees_the_slot_before_the_next_step(guided, device):
    model = guided(max_batch_size=1)
    expected = tokens_alone(guided(), [[5, 6], [7, 8, 9]], [PARAMS] * 2)

    def decode():
        engine = model.engine()
        (first,) = engine.add(request(model, [5, 6]))
        (second,) = engine.add(request(model, [7, 8, 9]))
        while len(first.tokens) < 4:
            engine.step()
        assert second.slot == -1
        engine.abort([first])
        engine.step()
        assert (first.slot, second.slot) == (-1, 0)
        while engine.scheduler:
            engine.step()
        assert first.tokens == expected[0][: len(first.tokens)]
        assert len(first.tokens) < 6
        assert second.tokens == expected[1]
        assert first.finish_reason == "cancelled"

    if device is None:
        decode()
    else:
        with engines_on(device()):
            decode()


def test_a_longer_request_grows_the_caches_under_running_ones(guided):
    """The caches keep their contents: the running sequences continue unchanged."""
    model = guided(max_batch_size=3)
    prompts = [[5, 6, 7], [8, 9] * 40, [4] * 200]
    expected = tokens_alone(guided(), prompts, [PARAMS] * 3)
    engine = model.engine()
    sequences, sizes = [], set()
    for prompt in prompts:
        sequences += engine.add(request(model, prompt))
        for _ in range(3):
            engine.step()
            sizes.add((engine.workspace.slots, engine.workspace.capacity))
    while engine.scheduler:
        engine.step()
    assert len(sizes) == 3
    assert [sequence.tokens for sequence in sequences] == expected


def test_threads_share_steps(guided, monkeypatch):
    """Concurrent calls are decoded in one batch, and each gets its own tokens."""
    model = guided()
    texts = random_prompts(random.Random(1), 8)
    expected = tokens_alone(guided(), texts, [PARAMS] * 8)
    batches, launch = [], Steps.launch

    def slowly(self, batch, *rest):
        batches.append(len(batch))
        time.sleep(0.01)  # other calls arrive meanwhile
        return launch(self, batch, *rest)

    monkeypatch.setattr(Steps, "launch", slowly)
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda text: model.generate(text, PARAMS)[0].token_ids, texts))
    assert outputs == expected
    assert max(batches) >= 3
    assert len(batches) < 8 * PARAMS.max_new_tokens / 2


def test_a_late_request_does_not_wait_for_a_long_one(guided):
    model = guided(max_batch_size=2)
    model.generate([5], max_new_tokens=1)
    done = []

    def long():
        model.generate([5, 6], PARAMS, max_new_tokens=200)
        done.append("long")

    thread = threading.Thread(target=long)
    thread.start()
    while not model.engine().scheduler.running and thread.is_alive():
        time.sleep(0.001)
    model.generate([7, 8], PARAMS, max_new_tokens=3)
    done.append("short")
    thread.join()
    assert done == ["short", "long"]


@pytest.mark.parametrize("device", [None, Lagging])
def test_a_late_request_is_admitted_in_the_next_step(guided, device):
    """A free slot is given in the next step. The request's first token comes with that step or the one after."""
    with engines_on(device()) if device else nullcontext():
        model = guided(max_batch_size=4)
        engine = model.engine()
        (long,) = engine.add(request(model, [5, 6], max_new_tokens=200))
        for count in range(1, 60):
            engine.step()
            if count % 5 == 0:
                (late,) = engine.add(request(model, [7, 8, count], max_new_tokens=4))
                engine.step()
                assert late.slot >= 0
                engine.step()
                assert len(late.tokens) >= 1
        assert not long.ended
        engine.abort([long])


@pytest.mark.parametrize("scarce", [False, True])
def test_nobody_starves(guided, scarce):
    """Short requests never stop coming. A long one waits only for those before it, a bounded number of steps.

    scarce: the long request needs the caches of all others together, so it can only run alone.
    """
    model = guided(max_batch_size=3)
    if scarce:
        model.cache_bytes = model.engine().workspace.token_bytes([0, 1]) * 70
    engine, length, steps = model.engine(), 6, 0
    shorts, admitted = [], {}

    def step(more):
        nonlocal steps
        for _ in range(more):
            shorts.append((steps, engine.add(request(model, [7, 8, 1 + len(shorts) % 99], max_new_tokens=length))[0]))
        engine.step()
        steps += 1
        for _, each in shorts:
            if each.slot >= 0 or each.ended:
                admitted.setdefault(each, steps)

    for _ in range(5):
        step(more=2)  # three slots and six steps each cannot keep up: the queue grows
    ahead, begun = len(engine.scheduler.waiting), steps
    (long,) = engine.add(request(model, [9] * 50, max_new_tokens=10))
    while long.slot < 0:
        step(more=1)
        # Three at a time take six steps, and one more to be admitted. Running requests must end first.
        assert steps - begun <= (ahead // 3 + 2) * (length + 2)
    first = steps
    while not long.ended:
        step(more=1)
    assert steps - first <= 10 + 2
    while engine.scheduler:
        step(more=0)
    order = [admitted[each] for _, each in shorts]
    assert order == sorted(order)  # first come, first served
    alone = tokens_alone(guided(), [[9] * 50], [PARAMS.override(max_new_tokens=10)])[0]
    assert long.tokens == alone


def test_a_failing_step_fails_those_in_it_and_nobody_else(guided, monkeypatch):
    model = guided(max_batch_size=1)
    engine, launch = model.engine(), Steps.launch
    (first,) = engine.add(request(model, [5, 6]))
    (second,) = engine.add(request(model, [7, 8]))
    for _ in range(3):
        engine.step()

    def fail(*_):
        raise RuntimeError("device lost")

    monkeypatch.setattr(Steps, "launch", fail)
    with pytest.raises(RuntimeError, match="device lost"):
        engine.step()
    monkeypatch.setattr(Steps, "launch", launch)
    assert str(first.error) == "the step that decoded it failed: RuntimeError: device lost"
    while engine.scheduler:
        engine.step()
    assert second.tokens == tokens_alone(guided(), [[7, 8]], [PARAMS])[0]


def test_a_held_stream_gives_its_slot_to_those_who_are_waited_for(guided):
    """A held stream loses its slot where memory is short. It continues later from its own text with the same tokens."""
    token = 2 * 2 * 2 * 2 * 8 * 4  # bytes per token of both members: layers, keys and values, heads, width, float32
    expected = tokens_alone(guided(), [[5, 6, 7], [8, 9]], [PARAMS] * 2)
    model = guided(cache_bytes=20 * token)
    with model.stream([5, 6, 7], PARAMS) as stream:
        for _ in range(4):
            next(stream)
        assert model.generate([8, 9], PARAMS)[0].token_ids == expected[1]
        list(stream)
    assert stream.output.token_ids == expected[0]


@pytest.mark.parametrize("device", [None, Lagging])
def test_a_stream_waits_for_its_reader(guided, device):
    """Steps of other requests do not advance a stream, so new weights count from the token after the last one read."""
    model = guided()

    def decode():
        with model.stream([5, 6, 7], PARAMS) as stream:
            for step, _ in enumerate(stream, 1):
                model.generate([8, 9], PARAMS, max_new_tokens=4)
                stream.set_weights(0.1 * step)
        return stream.output

    if device is None:
        output = decode()
        assert [w for (w,) in output.completions[0].weights] == [1.0, *(0.1 * step for step in range(1, 12))]
    else:
        with engines_on(device()):
            output = decode()
    from genarm_fast import reference

    used = output.completions[0].weights
    models = [member.model for member in model.members]
    alone = reference.generate(models[0], models[1:], [[5, 6, 7]] * 2, used.__getitem__, seed=1, max_new_tokens=12)
    assert output.token_ids == alone.tokens


def test_a_steered_stream_stays_asynchronous_and_exact(guided, monkeypatch):
    """On a device that the host runs ahead of, a change of weights redraws only the step in flight."""
    model = guided()
    launched, launch = [], Steps.launch
    monkeypatch.setattr(Steps, "launch", lambda self, *rest: launched.append(1) or launch(self, *rest))
    with engines_on(Lagging()):
        with model.stream([5, 6, 7], PARAMS) as stream:
            for step, _ in enumerate(stream, 1):
                if step in (3, 7):
                    stream.set_weights(step)
        assert [w for (w,) in stream.output.completions[0].weights] == [1.0] * 3 + [3.0] * 4 + [7.0] * 5
        assert len(launched) == 12 + 2
    assert stream.output.token_ids == model.generate([5, 6, 7], PARAMS)[0].token_ids[:3] + stream.output.token_ids[3:]


def test_times_of_a_stream_that_is_closed_early(guided, monkeypatch):
    """Timings stay non-negative, also while another prompt is still being prefilled, or waits."""
    monkeypatch.setattr(scheduler, "CHUNK_TOKENS", 8)
    model = guided(max_batch_size=2)
    with model.stream([[5, 6], [7] * 100, [8, 9]], PARAMS) as stream:
        next(stream)
    for output in stream.outputs:
        assert output.timing.prefill >= 0
        assert output.timing.decode >= 0
        assert output.timing.tokens_per_second >= 0


def test_a_processor_may_generate(guided):
    """A processor may call generate on the same model in the middle of a step."""
    model, found = guided(), []

    def ask(input_ids, scores):
        found.append(model.generate([8, 9], PARAMS)[0].token_ids)
        return scores

    output = model.generate([5, 6], PARAMS, max_new_tokens=2, logits_processors=[ask])[0]
    assert found == [tokens_alone(guided(), [[8, 9]], [PARAMS])[0]] * 2
    assert output.token_ids == tokens_alone(guided(), [[5, 6]], [PARAMS])[0][:2]


def test_an_abandoned_stream_leaves(guided):
    model = guided()
    stream = model.stream([5, 6], PARAMS)
    next(stream)
    assert model.engine().scheduler
    del stream
    assert not model.engine().scheduler


@pytest.mark.parametrize("rebind", [lambda p: p.data.clone(), lambda p: p.data.to(torch.float64).float()])
def test_weights_that_were_rebound_are_refused(tiny_model, tokenizer, rebind):
    base, arm = build_model("llama", 0), build_model("llama", 1)
    for changed, name in ((base, "base"), (arm, "arm")):
        model = GenARM.from_pretrained(base, arm, tokenizer=tokenizer)
        model.generate([5, 6], PARAMS)
        weight = changed.model.layers[1].mlp.up_proj.weight
        with torch.no_grad():
            weight.mul_(1.5)  # a change in place is allowed
        expected = GenARM.from_pretrained(base, arm, tokenizer=tokenizer).generate([5, 6], PARAMS)[0].token_ids
        assert model.generate([5, 6], PARAMS)[0].token_ids == expected
        weight.data = rebind(weight)
        with pytest.raises(RuntimeError, match=rf"^{name}: the weight model.layers.1.mlp.up_proj.weight was moved"):
            model.generate([5, 6], PARAMS)
        with pytest.raises(RuntimeError, match="was moved"):
            model.score([5, 6], [[7]])
