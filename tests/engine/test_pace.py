"""Long prompts beside running sequences, in simulated time: their chunks are as large as `max_step_ms` allows."""

from __future__ import annotations

import pytest
from doubles import Lagging, engines_on
from tiny_models import build_model

from genarm_fast import GenARM, SamplingParams
from genarm_fast.engine import pace, scheduler
from genarm_fast.engine.executor import Executor
from genarm_fast.engine.model_runner import ModelRunner
from genarm_fast.engine.pace import MIN_CHUNK_TOKENS, Pace
from genarm_fast.engine.step import Steps

PARAMS = SamplingParams(max_new_tokens=40, ignore_eos=True, seed=1)
DECODING, PER_TOKEN = 0.010, 0.001  # simulated seconds of a step, and of a prompt token


@pytest.fixture
def guided(tokenizer, monkeypatch):
    """make(...) returns a new GenARM on a simulated clock; make.steps lists the seconds of each step."""
    now, steps = [0.0], []
    prefill, launch = ModelRunner.prefill, Steps.launch

    def timed_prefill(self, tokens, *rest):
        now[0] += PER_TOKEN * tokens.numel()
        return prefill(self, tokens, *rest)

    def timed_launch(self, *rest):
        now[0] += DECODING
        return launch(self, *rest)

    monkeypatch.setattr(pace, "clock", lambda: now[0])
    monkeypatch.setattr(ModelRunner, "prefill", timed_prefill)
    monkeypatch.setattr(Steps, "launch", timed_launch)

    def make(**options):
        model = GenARM.from_pretrained(build_model("llama", 0), tokenizer=tokenizer, **options)
        engine, one = model.engine(), model.engine().step_in_turn

        def counted():
            before = now[0]
            advanced = one()
            steps.append(now[0] - before)
            return advanced

        engine.step_in_turn = counted
        return model

    make.steps = steps
    return make


def add(model, prompt, **overrides):
    (sequence,) = model.engine().add(model.prepare([prompt], PARAMS, **overrides)[0])
    return sequence


def step_until(model, condition):
    """Run steps until the condition holds; return their number."""
    engine, count = model.engine(), 0
    while not condition():
        engine.step()
        count += 1
        assert count < 200
    return count


@pytest.mark.parametrize("max_step_ms", [30.0, 60.0, None])
def test_a_long_prompt_holds_up_running_sequences_no_longer_than_allowed(guided, max_step_ms):
    """The prompt takes the number of steps that the limit implies, with the same tokens. Without a limit, one step is
    long."""
    model = guided(max_step_ms=max_step_ms)
    running = [add(model, [5, 6 + i]) for i in range(8)]
    step_until(model, lambda: all(len(each.tokens) > 3 for each in running))
    guided.steps.clear()
    prompt = [(7 * i) % 290 + 2 for i in range(201)]
    late = add(model, prompt, max_new_tokens=5)
    count = step_until(model, lambda: late.tokens)
    longest = max(guided.steps)
    if max_step_ms is None:
        assert (count, longest) == (1, pytest.approx(DECODING + 200 * PER_TOKEN))
    else:
        fitting = (max_step_ms / 1000 - DECODING) / PER_TOKEN
        assert longest <= max_step_ms / 1000 + 1e-9
        assert count <= 200 / fitting + 4  # the first chunks are small: the cost of a token is not known yet
    step_until(model, lambda: late.ended)
    alone = GenARM.from_pretrained(model.base.model, tokenizer=model.tokenizer)
    assert late.tokens == alone.generate(prompt, PARAMS, max_new_tokens=5)[0].token_ids


def test_a_late_request_gets_its_first_token_within_two_steps(guided):
    """Beside 8 running sequences this holds if the prompt fits into a chunk. A longer prompt takes one more step per
    chunk."""
    model = guided(max_step_ms=30.0)
    running = [add(model, [5, 6 + i]) for i in range(8)]
    step_until(model, lambda: all(len(each.tokens) > 3 for each in running))
    late = add(model, [3] * MIN_CHUNK_TOKENS)
    assert step_until(model, lambda: late.tokens) <= 2
    step_until(model, lambda: len(late.tokens) > 3)
    longer = add(model, [4] * 60)  # 59 tokens in chunks of 20
    assert step_until(model, lambda: longer.tokens) <= 2 + 3


def test_a_short_prompt_behind_a_long_one(guided, monkeypatch):
    """The short prompt waits for one chunk of the long one. Short prompts take at most every second chunk, however many
    come."""
    monkeypatch.setattr(scheduler, "CHUNK_TOKENS", 16)
    model = guided()
    long = add(model, [(7 * i) % 290 + 2 for i in range(1 + 6 * 16)])
    model.engine().step()
    assert long.cached == [16]
    short = add(model, [5, 6, 7])
    assert step_until(model, lambda: short.tokens) == 2
    assert long.cached == [32]
    count = 0
    while not long.tokens and count < 20:
        add(model, [9 + count, 8, 7], max_new_tokens=1)
        model.engine().step()
        count += 1
    assert count == 7  # the long prompt's four chunks, and three of short prompts between them
    step_until(model, lambda: long.ended)
    alone = GenARM.from_pretrained(model.base.model, tokenizer=model.tokenizer)
    assert long.tokens == alone.generate(list(long.request.token_ids[0]), PARAMS)[0].token_ids


def test_prompts_alone_are_prefilled_at_once(guided):
    """No sequence waits for a token meanwhile."""
    model = guided(max_step_ms=5.0)
    sequence = add(model, [3] * 200)
    assert step_until(model, lambda: sequence.tokens) == 1


def test_a_target_that_no_step_can_meet(guided):
    """Prompts are still prefilled, in the smallest chunks."""
    model = guided(max_step_ms=1.0)
    running = add(model, [5, 6])
    step_until(model, lambda: len(running.tokens) > 2)
    late = add(model, [3] * (4 * MIN_CHUNK_TOKENS + 1))
    assert step_until(model, lambda: late.tokens) == 4


def test_chunks_grow_step_by_step():
    """The cost of small chunks says little about large ones."""
    learned = Pace()
    assert learned.tokens(100.0) == MIN_CHUNK_TOKENS
    learned.observe(0, 0.01)
    learned.observe(MIN_CHUNK_TOKENS, 0.01)  # a token has no measurable cost
    assert learned.tokens(100.0) == 2 * MIN_CHUNK_TOKENS
    learned.observe(2 * MIN_CHUNK_TOKENS, 0.01)
    assert learned.tokens(100.0) == 4 * MIN_CHUNK_TOKENS
    assert learned.tokens(None) is None


@pytest.mark.parametrize("wrong", [0, -1.0, float("inf"), float("nan"), "50", True])
def test_wrong_limits(tiny_model, tokenizer, wrong):
    with pytest.raises((TypeError, ValueError), match=r"max_step_ms=.*expected a finite number > 0 or None"):
        GenARM.from_pretrained(tiny_model(), tokenizer=tokenizer, max_step_ms=wrong)
    model = GenARM.from_pretrained(tiny_model(), tokenizer=tokenizer)
    model.max_step_ms = wrong
    with pytest.raises((TypeError, ValueError), match="max_step_ms="):
        model.generate([5, 6], PARAMS)


def test_a_gpu_prefills_more_where_nobody_waits_for_a_token(tokenizer, monkeypatch):
    """A chunk has four times as many tokens in this test; beside a sequence that generates, it has no more than
    elsewhere."""
    widths, prefill, device = [], Executor.prefill, Lagging()
    device.prefill_factor = 4

    def counted(self, sequences, members, start, width):
        widths.append(width)
        return prefill(self, sequences, members, start, width)

    monkeypatch.setattr(scheduler, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(Executor, "prefill", counted)
    with engines_on(device):
        model = GenARM.from_pretrained(build_model("llama", 0), tokenizer=tokenizer)
        first = add(model, [(7 * i) % 290 + 2 for i in range(101)])
        step_until(model, lambda: len(first.tokens) > 2)
        assert widths == [32, 32, 32, 4]
        second = add(model, [(5 * i) % 290 + 2 for i in range(21)])
        step_until(model, lambda: second.tokens)
        assert widths[4:] == [8, 8, 4]
