"""Slots that change hands while steps are in flight, drafts are ahead, or prompts are shared."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
from doubles import Lagging, engines_on
from tiny_models import build_model, save_adapter

from genarm_fast import GenARM, GenerationError, SamplingParams
from genarm_fast.engine import scheduler
from genarm_fast.speculation.config import OFF, Speculation
from genarm_fast.speculation.observations import Choice
from genarm_fast.speculation.policy import DraftPolicy

GREEDY = {"max_new_tokens": 24, "ignore_eos": True, "temperature": 0.0}
SEEDED = {"max_new_tokens": 20, "ignore_eos": True, "seed": 1}
PROMPT = list(range(20, 32))


@pytest.fixture
def guided(tokenizer):
    """guided(arm_seed, ...): a new GenARM of a base and an ARM. With seed 0 they are equal, and all drafts right."""

    def make(arm_seed=1, **options):
        models = [build_model("llama", seed) for seed in (0, arm_seed)]
        return GenARM.from_pretrained(*models, tokenizer=tokenizer, **{"speculation": "off", **options})

    return make


def sequences_of(model, prompt, speculation=OFF, **params):
    (request,) = model.prepare([prompt], SamplingParams(**params))
    return request.sequences(model.tokenizer, speculation)


def room(model, tokens):
    """Limit the caches to `tokens` tokens of both members and return the engine, which applies the limit."""
    model.cache_bytes = model.engine().workspace.token_bytes([0, 1]) * tokens
    return model.engine()


def steps(engine, count):
    for _ in range(count):
        engine.step()


@pytest.mark.parametrize("whole", [False, True])
def test_drafts_ahead_of_a_preempted_sequence_are_dropped(guided, whole):
    """The sequence's caches are prefilled anew and do not hold the drafts that the old caches had."""
    model = guided(0)
    expected = model.generate(PROMPT, **GREEDY)[0].token_ids
    with engines_on(Lagging(whole_steps=whole)):
        engine = room(model, 45)
        stream = model.stream(PROMPT, **GREEDY, speculation=Speculation("arm", 2))
        next(stream)
        next(stream)
        (sequence,) = stream._sequences
        ahead = engine.steps.in_flight.max_tokens - 1 if whole else len(engine.drafters[0].rollout)
        assert ahead > 0
        model.generate([[3] * 20], max_new_tokens=5, ignore_eos=True)
        assert sequence.slot == -1
        list(stream)
        assert stream.output.token_ids == expected


def test_a_step_in_flight_counts_no_more_after_a_preemption(guided, monkeypatch):
    """Another sequence had the slot meanwhile, and left before its prompt was complete."""
    model = guided()
    expected = model.generate(PROMPT, **GREEDY)[0].token_ids
    monkeypatch.setattr(scheduler, "CHUNK_TOKENS", 8)
    with engines_on(Lagging()):
        engine = room(model, 45)
        stream = model.stream(PROMPT, **GREEDY)
        for _ in range(3):
            next(stream)
        (sequence,) = stream._sequences
        assert engine.steps.in_flight is not None
        other = engine.run(sequences_of(model, [3] * 35, max_new_tokens=5))
        steps(engine, 3)
        assert (sequence.slot, other.sequences[0].slot) == (-1, 0)
        other.close()
        list(stream)
        assert stream.output.token_ids == expected


def test_two_held_streams_give_their_slots(guided):
    """Admission ends, though both streams wait for a slot themselves afterwards."""
    params = {**SEEDED, "max_new_tokens": 12}
    expected = guided().generate([[5, 6, 7], [8, 9, 7], [3, 4, 5]], **params)
    model = guided()
    room(model, 2 * 16)
    streams = [model.stream(prompt, **params) for prompt in ([5, 6, 7], [8, 9, 7])]
    for stream in streams:
        next(stream)
    assert model.engine().workspace.slots == 2
    assert model.generate([3, 4, 5], **params)[0].token_ids == expected[2].token_ids
    for stream, output in zip(streams, expected):
        list(stream)
        assert stream.output.token_ids == output.token_ids


def test_a_steered_stream_goes_on_while_a_long_request_waits(guided):
    """The stream starts to need an ARM, whose caches are sized by sequences with a slot, not by the waiting request."""
    model = guided()
    engine = room(model, 200)
    params = {**SEEDED, "max_new_tokens": 30, "weights": 0.0}
    streams = [model.stream([5, 6, 7], **params) for _ in range(2)]
    for stream in streams:
        next(stream)
        stream._sequences[0].held = False  # the reader asks for more
    long = engine.run(sequences_of(model, [3] * 100, max_new_tokens=100, ignore_eos=True))
    streams[0].set_weights(1.0)
    steps(engine, 3)
    assert [stream._sequences[0].error for stream in streams] == [None, None]
    long.close()
    for stream in streams:
        list(stream)
        assert len(stream.output.token_ids) == 30


def test_short_requests_run_together_before_a_long_one(guided):
    """Under `cache_bytes`, the long request at the end of the queue does not size the caches of those before it."""
    model = guided()
    prompts, params = [[5, 6, 7], [8, 9], [4, 5], [7] * 60], {**SEEDED, "max_new_tokens": 4}
    engine = room(model, 70)  # one slot of the longest request, or eight of the others
    model.max_batch_size = 3
    sequences = [sequences_of(model, prompt, **params)[0] for prompt in prompts]
    run = model.engine().run(sequences)
    engine.step()
    assert [sequence.slot >= 0 for sequence in sequences] == [True, True, True, False]
    for _ in run:
        pass
    expected = [output.token_ids for output in guided().generate(prompts, **params)]
    assert [sequence.tokens for sequence in sequences] == expected


def test_a_long_request_among_the_first_does_not_part_the_short_ones(guided):
    """Memory fits one slot of the long request, or eight of the short ones. It waits only for those before it."""
    model = guided()
    prompts, params = [[5, 6, 7], [8, 9], [7] * 60, [4, 5], [3, 4]], {**SEEDED, "max_new_tokens": 4}
    engine = room(model, 70)
    model.max_batch_size = 4
    sequences = [sequences_of(model, prompt, **params)[0] for prompt in prompts]
    run = model.engine().run(sequences)
    placed = []
    while not all(sequence.ended for sequence in sequences):
        engine.step()
        placed.append([i for i, sequence in enumerate(sequences) if sequence.slot >= 0])
    run.close()
    assert placed[0] == [0, 1]
    assert {tuple(each) for each in placed if each} == {(0, 1), (2,), (3, 4)}
    expected = [output.token_ids for output in guided().generate(prompts, **params)]
    assert [sequence.tokens for sequence in sequences] == expected


def test_no_prompt_is_shared_from_caches_that_were_dropped(guided):
    """A longer request makes larger caches, and the contents of the smaller ones are lost."""
    model, prompt = guided(), list(range(20, 40))
    engine = room(model, 250)
    decoded = []
    for tokens, count in ((prompt, 2), ([4, 5], 12), ([*prompt, 5, 6], 200)):
        decoded += engine.add(model.prepare([tokens], SamplingParams(**SEEDED), max_new_tokens=count)[0])
        engine.step()
    assert [each.slot for each in decoded] == [-1, 1, -1]  # two slots of that length exceed the memory
    while engine.scheduler:
        engine.step()
    assert engine.workspace.slots == 1
    assert decoded[2].tokens == guided().generate([*prompt, 5, 6], **{**SEEDED, "max_new_tokens": 200})[0].token_ids


@pytest.mark.parametrize("closed", [False, True])
def test_nobody_waits_for_the_prompt_of_a_stream_that_stands_still(guided, monkeypatch, closed):
    """In mid-prefill the stream is closed, or steered so that it drops the member that the other one waits for."""
    monkeypatch.setattr(scheduler, "CHUNK_TOKENS", 16)
    model, prompt = guided(), list(range(20, 80))
    expected = guided().generate([*prompt, 3], **SEEDED)[0].token_ids
    engine = model.engine()
    stream = model.stream(prompt, **SEEDED)
    run = engine.run(sequences_of(model, [*prompt, 3], **SEEDED))
    engine.step()
    (waiting,) = run.sequences
    assert waiting.donor is stream._sequences[0]
    if closed:
        stream.close()
    else:
        stream.set_weights(0.0)
    steps(engine, 40)
    assert closed or stream._sequences[0].held
    assert waiting.tokens == expected


def test_a_donor_gives_no_member_that_it_was_not_compared_in(guided, monkeypatch):
    """The base's prompts begin alike, the ARM's do not. The ARM's weight comes while the prompt is shared."""
    monkeypatch.setattr(scheduler, "CHUNK_TOKENS", 8)
    model, shared = guided(), list(range(20, 40))

    def pair():
        first = sequences_of(model, [*shared, 5], **SEEDED)[0]
        second = sequences_of(model, [*shared, 6], **SEEDED, weights=0.0)[0]
        first.request.token_ids[1] = list(range(60, 90))
        second.request.token_ids[1] = list(range(90, 120))
        return first, second

    engine, alone, together = model.engine(), pair()[1], pair()
    run = engine.run([alone])
    engine.steer(alone, (1.0,))
    for _ in run:
        pass
    run = engine.run([*together])
    engine.step()
    assert together[1].donor is together[0]
    engine.steer(together[1], (1.0,))
    for _ in run:
        pass
    assert together[1].tokens == alone.tokens


@pytest.mark.parametrize("device", [None, Lagging])
def test_members_that_are_needed_no_more_stop_drafting(tmp_path, tokenizer, device):
    """Sequences end while a step is in flight. The drained step decides which members run, and so which may draft."""
    build_model("llama", 0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "lane", base=tmp_path / "base", seed=1)
    arms = [tmp_path / "lane", build_model("qwen2", 3)]
    model = GenARM.from_pretrained(tmp_path / "base", arms, dtype=torch.float32, speculation="off")
    requests = [
        ([4, 5, 6], 4, [1.0, 1.0], OFF),
        ([5, 5, 6], 5, [1.0, 1.0], Speculation("base", 2)),
        ([6, 5, 6], 20, [0.0, 1.0], Speculation("base", 2)),
    ]

    def decode():
        made = [
            sequences_of(model, prompt, plan, max_new_tokens=count, weights=weights, ignore_eos=True, seed=1)[0]
            for prompt, count, weights, plan in requests
        ]
        for _ in model.engine().run(made):
            pass
        return [sequence.tokens for sequence in made]

    with engines_on(device()) if device else nullcontext():
        found = decode()
    for tokens, (prompt, count, weights, _) in zip(found, requests):
        alone = model.generate(prompt, max_new_tokens=count, weights=weights, ignore_eos=True, seed=1)[0]
        assert tokens == alone.token_ids


def test_a_draft_model_knows_what_it_was_shown(guided, monkeypatch):
    """While an ARM drafts, the draft model's cache misses tokens: the model is fed them before it drafts again."""
    draft_model = build_model("llama", 0, initializer_range=0.29)  # like the base, and often wrong
    model = guided(0, draft_model=draft_model)
    engine = model.engine()
    names = [drafter.names for drafter in engine.drafters]
    turns = itertools.cycle([names.index(("draft_model",)), names.index(("arm",))])
    monkeypatch.setattr(DraftPolicy, "choose", lambda self, rows: Choice(next(turns), 2))
    drafter = engine.drafters[names.index(("draft_model",))]
    propose, compared = drafter.propose, []

    def checked(batch, most):
        drafts = propose(batch, most)
        text = [*prompt, *sequence.tokens]
        for token in drafts.tensor[0].tolist():
            compared.append(token == int(draft_model(torch.tensor([text])).logits[0, -1].argmax()))
            text.append(token)
        return drafts

    monkeypatch.setattr(drafter, "propose", checked)
    prompt = [5, 9, 8]
    (sequence,) = sequences_of(model, prompt, Speculation(k=2), **{**GREEDY, "max_new_tokens": 60})
    for _ in engine.run([sequence]):
        pass
    assert 0 < sequence.accepted < sequence.drafted
    assert len(compared) > 20
    assert all(compared)


def test_refusals_are_heard_of_even_if_the_step_fails(guided, monkeypatch):
    model = guided()
    engine = room(model, 40)
    long, short = (sequences_of(model, prompt, **SEEDED)[0] for prompt in ([5] * 90, [6, 7]))
    runs = [engine.run([sequence]) for sequence in (long, short)]

    def fail(*_):
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine.steps, "launch", fail)
    with pytest.raises(RuntimeError, match="device lost"):
        engine.step()
    assert [list(run) for run in runs] == [[[long]], [[short]]]
    assert isinstance(long.error, MemoryError)
    assert str(short.error) == "the step that decoded it failed: RuntimeError: device lost"
    assert not engine._news
    with pytest.raises(GenerationError, match=r"prompts\[0\]: 110 tokens"):
        model.generate([5] * 90, **SEEDED)
