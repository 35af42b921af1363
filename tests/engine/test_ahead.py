"""Drafts on a device that runs behind the host.

Steps that are one launch start before the host has read the previous step. In other steps, the next block is drafted
while one is verified, and dropped if it turns out not to follow.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from against_reference import random_params, random_prompts
from doubles import Accesses, Lagging, Recorder, engines_on
from tiny_models import build_model, similar

from genarm_fast import GenARM, SamplingParams, reference
from genarm_fast.engine.in_flight import InFlight
from genarm_fast.engine.step import Steps
from genarm_fast.speculation.config import OFF, Speculation
from genarm_fast.speculation.drafter import Drafts
from genarm_fast.speculation.model_drafter import DraftRollout, ModelDrafter
from genarm_fast.speculation.ngram_drafter import NgramIndex
from genarm_fast.speculation.observations import PLAIN
from genarm_fast.speculation.policy import DraftPolicy

FREE = SamplingParams(max_new_tokens=24, ignore_eos=True, seed=1)


@pytest.fixture
def advances(monkeypatch):
    """The number of steps of each block that was drafted ahead and used."""
    used, advance = [], DraftRollout.advance

    def counted(self, steps):
        advance(self, steps)
        used.append(len(self))

    monkeypatch.setattr(DraftRollout, "advance", counted)
    return used


def results(outputs):
    return [[(c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in output.completions] for output in outputs]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("case", range(24))
def test_equals_plain_decoding(tiny_model, tokenizer, case, advances, whole):
    """The cases cover stop tokens, stop strings, limits, rows that leave and are replaced, penalties, and filters."""
    rng = random.Random(case)
    arms = [similar(case), *([tiny_model(seed=1)] if case % 3 == 0 else [])]
    draft = similar(case + 1, 0.01) if case % 4 == 1 else None
    model = GenARM.from_pretrained(
        tiny_model(), arms, draft_model=draft, tokenizer=tokenizer, max_batch_size=rng.randint(1, 3)
    )
    prompts = random_prompts(rng, 6)
    params = [random_params(rng, len(arms)) for _ in prompts]
    for each in params:
        each |= {"max_new_tokens": rng.randint(1, 40), "weights": [rng.choice([0.5, 2.0]), *[0.1] * (len(arms) - 1)]}
    shown = {"rewards": rng.random() < 0.5, "logprobs": rng.choice([None, 0, 3])}
    requests = [SamplingParams(**each, seed=rng.getrandbits(64), **shown) for each in params]
    free = model.generate(prompts, requests)
    if case % 2:
        requests = [each.override(stop=[output.text[3:6] or "x"]) for each, output in zip(requests, free)]
        free = model.generate(prompts, requests)
    name = rng.choice([*model.arm_names[:1], "base"]) if draft is None else "draft_model"
    with engines_on(Lagging(whole_steps=whole)):
        outputs = model.generate(prompts, requests, speculation=Speculation(name, rng.randint(1, 5)))
    assert results(outputs) == results(free)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("case", range(8))
def test_whatever_auto_chooses(tiny_model, tokenizer, case, whole):
    """Random times drive the tuner, so kinds of steps take turns, and the host reads some of them late."""
    rng = random.Random(case)
    draft = similar(case + 1, 0.01) if case % 3 == 0 else None
    model = GenARM.from_pretrained(
        tiny_model(), similar(case), draft_model=draft, tokenizer=tokenizer, max_batch_size=rng.randint(1, 3)
    )
    prompts = random_prompts(rng, 5)
    params = [random_params(rng, 1) | {"max_new_tokens": rng.randint(1, 60)} for _ in prompts]
    for each in params if case % 2 else ():  # without parameters that need the host
        each |= {"min_new_tokens": 0, "logit_bias": None}
        each |= {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
    requests = [SamplingParams(**each, seed=rng.getrandbits(64), rewards=rng.random() < 0.5) for each in params]
    device = Lagging(whole_steps=whole)
    device.clock = rng.random
    with engines_on(device):
        outputs = model.generate(prompts, requests, speculation="auto")
    assert results(outputs) == results(model.generate(prompts, requests))
    assert len(model.tuners.stats()[0]["steps"]) > 1


def test_those_cases_draft_ahead(tiny_model, tokenizer, advances):
    """Batches draft ahead too, as long as all rows' drafts are right."""
    for case in (4, 12):
        test_equals_plain_decoding(tiny_model, tokenizer, case, advances, whole=False)
    assert sum(advances) > 10


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["arm", "base"])
def test_weights_change_while_a_block_is_ahead(tiny_model, tokenizer, advances, name, whole):
    """A block drafted with the old weights may still be used, because the targets are drawn with the new weights."""
    base, arm = tiny_model(), similar()
    model = GenARM.from_pretrained(base, arm, tokenizer=tokenizer)
    changing = model.stream([5, 6, 7], FREE.override(max_new_tokens=60), speculation=Speculation(name, 2))
    with engines_on(Lagging(whole_steps=whole)), changing as stream:
        for chunk in stream:
            stream.set_weights(2.0 + (len(chunk.token_ids) + chunk.token_ids[-1]) % 5)
    used = stream.output.completions[0].weights
    assert len(set(used)) > 3
    expected = reference.generate(base, [arm], [[5, 6, 7]] * 2, used.__getitem__, seed=1, max_new_tokens=60)
    assert stream.output.token_ids == expected.tokens


def test_a_stream_cancelled_with_a_block_ahead(tiny_model, tokenizer, advances):
    model = GenARM.from_pretrained(tiny_model(), similar(noise=0.0), tokenizer=tokenizer, max_batch_size=1)
    params = FREE.override(max_new_tokens=30)
    expected = results(model.generate([[5, 6, 7], [8, 9]], params))
    plan = Speculation("arm", 3)
    with engines_on(Lagging(whole_steps=False)):
        with model.stream([5, 6, 7], params, speculation=plan) as stream:
            for _ in range(3):
                next(stream)
        assert sum(advances) >= 3
        assert results(model.generate([[5, 6, 7], [8, 9]], params, speculation=plan)) == expected


def launched(model, params=FREE, k=3, prompts=([5, 6, 7],)):
    recorder = Recorder(whole_steps=False)
    with engines_on(recorder), Accesses(recorder):
        model.generate([*prompts], params, speculation=Speculation("arm", k))
    assert recorder.found == []
    return recorder


def test_nothing_is_drafted_twice(tiny_model, tokenizer):
    """An ARM that is always right feeds every token once, the base one in four. No draft is left over at the end."""
    model = GenARM.from_pretrained(tiny_model(), similar(noise=0.0), tokenizer=tokenizer)
    names = [name for name, *_ in launched(model).launches]
    assert names.count("arm[0].forward") == 24
    assert names.count("base.forward") == 6


def test_the_next_block_is_drafted_while_one_is_verified(tiny_model, tokenizer, monkeypatch):
    """Drafting and verification do not wait for each other, and the host does not wait for drafts made ahead."""
    model = GenARM.from_pretrained(tiny_model(), similar(noise=0.0), tokenizer=tokenizer)
    waits = []

    def checked(batch, *rest):
        device, main = batch.executor.device, batch.executor.main
        (arm,) = {stream for name, stream, *_ in device.launches if name == "arm[0].forward"}
        waits.append(device.clocks[main][arm] < device.clocks[arm][arm])
        return InFlight(batch, *rest)

    monkeypatch.setattr("genarm_fast.engine.step.InFlight", checked)
    rounds = [[]]
    for launch in launched(model).launches:
        if launch[0].endswith(".forward"):
            rounds[-1].append(launch)
        elif launch[0] == "step":
            rounds.append([])
    for forwards in rounds[1:5]:  # the first round has no block ahead yet, the last no further one
        (_, stream, behind, end), *ahead = forwards
        assert [name for name, *_ in forwards] == ["base.forward", *["arm[0].forward"] * 4]
        assert all(before.get(stream, 0) < end for _, _, before, _ in ahead)
        assert behind[ahead[0][1]] < ahead[0][3]
    assert waits == [*[True] * 5, False]


def test_every_hand_over_is_needed(tiny_model, tokenizer):
    """Without any one hand-over, also of blocks drafted ahead, the recorder finds an unordered access."""
    model = GenARM.from_pretrained(tiny_model(), similar(noise=0.0), tokenizer=tokenizer)
    params = FREE.override(max_new_tokens=4)
    for number in range(launched(model, params, 1).hand_overs):
        recorder = Recorder(number, whole_steps=False)
        with engines_on(recorder), Accesses(recorder):
            model.generate([5, 6, 7], params, speculation=Speculation("arm", 1))
        assert recorder.found, number


@pytest.mark.parametrize("broken", [False, True])
def test_a_block_kept_after_a_rejection_would_be_seen(tiny_model, tokenizer, monkeypatch, broken):
    model = GenARM.from_pretrained(tiny_model(), similar(noise=0.1), tokenizer=tokenizer)
    expected = results(model.generate([5, 6, 7], FREE))

    def kept(self, drafts, *_):
        self.rollout.advance(drafts.width + 1)
        self.rollout.start = [len(sequence.tokens) for sequence in self.rollout.sequences]

    if broken:
        monkeypatch.setattr(ModelDrafter, "accepted", kept)
    with engines_on(Lagging(whole_steps=False)):
        found = results(model.generate([5, 6, 7], FREE, speculation=Speculation("arm", 2)))
    assert (found == expected) != broken


def test_how_far_ahead():
    """Drafts made ahead fit into verification and end with the next block or the text. Wrong drafts stop them."""
    drafter = ModelDrafter(SimpleNamespace(draft_model=None), 1, (1,), ("arm",))
    drafter.all_right_share = 1.0
    sequence = SimpleNamespace(remaining=20)

    def steps():
        drafter.rollout = SimpleNamespace(sequences=[sequence])
        return drafter.ahead(3)

    assert steps() == 3 + 4
    drafts = Drafts(torch.zeros(1, 3), [3], None, steps=3)
    drafter.accepted(drafts, [3], 3.0, 2.5)  # a step takes 1 s
    assert steps() == 3 + 2
    drafter.accepted(drafts, [3], 3.0, 0.1)
    assert steps() == 3 + 1  # the tokens that the targets need
    drafter.accepted(drafts, [3], 3.0, 30.0)
    sequence.remaining = 6
    assert steps() == 6
    sequence.remaining = 20
    for _ in range(30):
        steps()
        drafter.accepted(drafts, [2], 3.0, 30.0)
    assert steps() == 3 + 1
    for _ in range(3):
        steps()
        drafter.accepted(drafts, [3], 3.0, 30.0)
    assert steps() == 3 + 4


@pytest.mark.parametrize("case", range(12))
def test_the_device_looks_up_what_the_host_does(tiny_model, tokenizer, case, monkeypatch):
    """Both find the same drafts, also beside rows that leave, in refilled slots, and where the text has none."""
    rng = random.Random(case)
    model = GenARM.from_pretrained(tiny_model(), similar(case), tokenizer=tokenizer, max_batch_size=rng.randint(1, 3))
    prompts = [prompt * rng.randint(1, 3) for prompt in random_prompts(rng, 6)]
    bias = dict.fromkeys(rng.sample(range(2, 300), 3), 30.0)  # few different tokens, so that endings recur
    requests = [FREE.override(max_new_tokens=rng.randint(1, 30), seed=i, logit_bias=bias) for i in range(6)]
    seen, finish = [], Steps.finish

    def checked(self, step):
        known = [NgramIndex([*each.request.token_ids[0], *each.tokens]) for each in step.batch.sequences]
        finish(self, step)
        if step.choice.k and step.max_tokens > 1:
            seen.extend((mine.propose(step.choice.k), drafted) for mine, drafted in zip(known, step.read().drafts))

    monkeypatch.setattr(Steps, "finish", checked)
    with engines_on(Lagging()):
        outputs = model.generate(prompts, requests, speculation=Speculation("ngram", 3))
    assert results(outputs) == results(model.generate(prompts, requests))
    assert len(seen) > 10
    assert any(drafted for _, drafted in seen)
    assert all(mine == drafted for mine, drafted in seen)


@pytest.mark.parametrize("drafter", ["arm", "ngram"])
def test_a_ban_on_stop_tokens_ends_within_a_block(tiny_model, tokenizer, drafter):
    """All positions of a step share one bias. The ban has to end at the right position all the same."""
    model = GenARM.from_pretrained(tiny_model(), similar(noise=0.0), tokenizer=tokenizer)
    params = SamplingParams(max_new_tokens=20, min_new_tokens=3, stop_token_ids=[9], logit_bias={9: 50.0}, seed=1)
    with engines_on(Lagging()):
        (output,) = model.generate([5, 6, 5, 6, 5, 6], params, speculation=Speculation(drafter, 5))
    assert output.token_ids.index(9) == 3
    assert output.completions[0].finish_reason == "stop"


def test_each_sequence_gets_as_many_drafts_as_it_asked_for(tiny_model, tokenizer):
    """The sequence with the most tokens left decides the drafter. A sequence that asked for no drafts gets none."""
    model = GenARM.from_pretrained(tiny_model(), similar(noise=0.0), tokenizer=tokenizer)
    with engines_on(Lagging()):
        engine = model.engine()
        plans = (Speculation("arm", 3), Speculation("arm", 1), OFF)
        made = [engine.add(model.prepare([[5, 6, 7]], FREE)[0], plan)[0] for plan in plans]
        while engine.scheduler:
            engine.step()
    assert [each.drafted for each in made] == [18, 12, 0]


def test_a_draft_model_is_shown_what_it_did_not_draft(tiny_model, tokenizer):
    """A draft model equal to the base is always right, also after steps without it, one of them in flight."""
    model = GenARM.from_pretrained(tiny_model(), draft_model=build_model("llama", 0), tokenizer=tokenizer)
    with engines_on(Lagging()):
        engine = model.engine()
        (plain,) = engine.add(model.prepare([[8, 9]], FREE.override(max_new_tokens=5))[0], OFF)
        engine.step()
        (drafted,) = engine.add(model.prepare([[5, 6, 7]], FREE)[0], Speculation("draft_model", 3))
        while engine.scheduler:
            engine.step()
    assert len(plain.tokens) == 5
    assert drafted.drafted == drafted.accepted > 12


def test_a_draft_model_and_plain_steps_take_turns(tiny_model, tokenizer, monkeypatch):
    """A plain step in flight yields a token that the draft model has not seen when the next drafts are due."""
    model = GenARM.from_pretrained(tiny_model(), draft_model=build_model("llama", 0), tokenizer=tokenizer)
    choose, turns = DraftPolicy.choose, []

    def now_and_then(self, rows):
        turns.append(rows)
        return choose(self, rows) if len(turns) % 5 else PLAIN

    launch, launched = Steps._launch_as_graph, set()

    def noted(self, batch, policy, choice):
        launched.add((None if self.in_flight is None else self.in_flight.choice.k, choice.k))
        return launch(self, batch, policy, choice)

    monkeypatch.setattr(DraftPolicy, "choose", now_and_then)
    monkeypatch.setattr(Steps, "_launch_as_graph", noted)
    with engines_on(Lagging()):
        params = FREE.override(max_new_tokens=60)
        (output,) = model.generate([5, 6, 7], params, speculation=Speculation("draft_model", 3))
    assert output.rounds.drafted == output.rounds.accepted > 5
    assert {(3, 3), (3, 0)} <= launched  # drafts before a step with drafts and before a plain step are both read
    assert (0, 3) not in launched
