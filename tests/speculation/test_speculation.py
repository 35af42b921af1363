"""Drafting never changes a token: float32 tokens equal plain decoding's and the naive reference's."""

from __future__ import annotations

import random
from itertools import cycle
from weakref import WeakKeyDictionary

import pytest
import torch
from against_reference import assert_equals_reference, random_batch, random_params, random_prompts
from doubles import Lagging, engines_on
from tiny_models import build_model

from genarm_fast import GenARM, SamplingParams, reference
from genarm_fast.device.base import Device
from genarm_fast.engine import sampler, step_graph
from genarm_fast.engine.executor import Executor
from genarm_fast.engine.model_runner import ModelRunner
from genarm_fast.kernels import guided_sample
from genarm_fast.speculation import model_drafter
from genarm_fast.speculation.config import Speculation
from genarm_fast.speculation.model_drafter import ModelDrafter
from genarm_fast.speculation.ngram_drafter import NgramIndex
from genarm_fast.speculation.observations import PLAIN, Choice
from genarm_fast.speculation.policy import DraftPolicy
from genarm_fast.speculation.tuner import Tuner


def tokens_of(outputs):
    return [[completion.token_ids for completion in output.completions] for output in outputs]


@pytest.mark.parametrize("case", range(24))
def test_equals_plain_decoding(tiny_model, tokenizer, case):
    """The cases cover every drafter, any K, ragged batches with different parameters, and reused slots."""
    rng = random.Random(case)
    model, prompts, params, requests = random_batch(rng, tiny_model, tokenizer, case % 3, 6)
    plain = tokens_of(model.generate(prompts, requests, speculation="off"))
    names = ["ngram", "base", *model.arm_names] if model.arms else ["ngram"]
    for name in names:
        outputs = model.generate(prompts, requests, speculation=Speculation(name, rng.randint(1, 8)))
        assert tokens_of(outputs) == plain
    for output, each in zip(outputs, params):
        assert_equals_reference(model, output, **each)


def test_weights_change_between_rounds(tiny_model, tokenizer):
    """Tokens settled before a change keep their weights. Later tokens get the new weights, even if drafted with the
    old."""
    base, arms = tiny_model(), [tiny_model(seed=1), tiny_model(seed=2)]
    model = GenARM.from_pretrained(base, arms, tokenizer=tokenizer)
    for name in ("base", *model.arm_names, "ngram"):
        plan = Speculation(name, 4)
        with model.stream([5, 6, 7], seed=3, max_new_tokens=30, ignore_eos=True, speculation=plan) as stream:
            for chunk in stream:
                stream.set_weights([len(chunk.token_ids), -0.5 * chunk.token_ids[-1] / 300])
        used = stream.output.completions[0].weights
        assert len(set(used)) > 3
        expected = reference.generate(base, arms, [[5, 6, 7]] * 3, used.__getitem__, seed=3, max_new_tokens=30)
        assert stream.output.token_ids == expected.tokens


@pytest.mark.parametrize(("k", "drafter"), [(0, None), (3, "arm"), (2, "ngram")])
def test_rounds_are_reported(tiny_model, tokenizer, k, drafter):
    """An ARM equal to the base drafts what both predict. Each round settles one token more than the drafts it keeps."""
    model = GenARM.from_pretrained(tiny_model(), build_model("llama", 0), tokenizer=tokenizer)
    params = {"max_new_tokens": 24, "ignore_eos": True, "seed": 1, "temperature": 0.05}
    output = model.generate([5, 6, 7], speculation=Speculation(drafter, k), **params)[0]
    rounds = output.rounds
    assert rounds.rounds + rounds.accepted == 24
    assert rounds.accepted <= rounds.drafted <= k * rounds.rounds
    if drafter == "arm":
        assert rounds.accepted == rounds.drafted == 18


@pytest.mark.parametrize("case", range(4))
def test_an_extra_draft_model(tiny_model, tokenizer, case):
    """The draft model proposes and has no part in the text. A draft model equal to the base is often right."""
    rng = random.Random(case)
    arms = [tiny_model(seed=1)] if case % 2 else []
    models = [tiny_model(), arms, build_model("llama", rng.choice([0, 7]))]
    model = GenARM.from_pretrained(*models[:2], draft_model=models[2], tokenizer=tokenizer, max_batch_size=2)
    prompts = random_prompts(rng, 4)
    requests = [SamplingParams(**random_params(rng, len(arms)), seed=i, n=2, rewards=True) for i in range(4)]
    plain = tokens_of(model.generate(prompts, requests))
    assert tokens_of(model.generate(prompts, requests, speculation=Speculation("draft_model", 3))) == plain


def test_a_draft_model_catches_up(tiny_model, tokenizer, monkeypatch):
    """A draft model equal to the base stays right after rounds in which another drafter or none drafted."""
    # Without ARMs there are two drafters: the draft model, then n-grams.
    turns = cycle(Choice(*turn) for turn in [(None, 0), (1, 3), (0, 2), (None, 0), (0, 1), (1, 2)])
    monkeypatch.setattr(DraftPolicy, "choose", lambda self, rows: next(turns))
    model = GenARM.from_pretrained(tiny_model(), draft_model=build_model("llama", 0), tokenizer=tokenizer)
    seen, accepted = [], ModelDrafter.accepted

    def counted(self, drafts, right, *seconds):
        seen.extend(zip(right, drafts.counts))
        return accepted(self, drafts, right, *seconds)

    monkeypatch.setattr(ModelDrafter, "accepted", counted)
    params = {"max_new_tokens": 60, "ignore_eos": True, "temperature": 0.7}
    outputs = model.generate(random_prompts(random.Random(3), 3), seed=1, speculation="auto", **params)
    assert sum(count for _, count in seen) > 40
    assert all(right == count for right, count in seen)
    assert tokens_of(outputs) == tokens_of(model.generate([o.prompt_token_ids for o in outputs], seed=1, **params))


def test_refusals(tiny_model, tokenizer):
    model = GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer)
    expected = r"speculation: drafter='small': expected one of 'base', 'arm', 'ngram'"
    with pytest.raises(ValueError, match=expected):
        model.generate("a", speculation=Speculation("small"))
    with pytest.raises(ValueError, match=r"speculation='on': expected \"auto\", \"off\" or a Speculation"):
        model.stream("a", speculation="on")
    with pytest.raises(ValueError, match=r"k=-1: expected None or an integer in 0\.\.32"):
        Speculation(k=-1)
    with pytest.raises(TypeError, match=r"max_k=True: expected an integer in 1\.\.32"):
        Speculation(max_k=True)
    with pytest.raises(ValueError, match="draft_model: expected a vocabulary of at least 300"):
        GenARM.from_pretrained(tiny_model(), draft_model=tiny_model(vocab_size=299), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="draft_model"):
        GenARM.from_pretrained(
            tiny_model(), draft_model=build_model("llama", 0, max_position_embeddings=16), tokenizer=tokenizer
        ).generate("a" * 40)


def off_by_one(monkeypatch):
    forward = ModelRunner.forward

    def shifted(self, tokens, positions, slots, kv_bound, lanes):
        shift = int(tokens.shape[-1] > 1)  # blocks that verify drafts
        return forward(self, tokens, positions + shift, slots, kv_bound + shift, lanes)

    monkeypatch.setattr(ModelRunner, "forward", shifted)


def no_roll_back(monkeypatch):
    """Inject a fault: the base continues after rejected drafts."""
    feed, behind = Executor.forward, WeakKeyDictionary()

    def forward(self, tokens, positions, slots, kv_bound, lanes):
        ends = behind.setdefault(self, {})
        starts = positions[0, :, 0].tolist()
        moved = torch.tensor([max(ends.get(slot, start) - start, 0) for slot, start in zip(slots, starts)])
        positions = (positions + moved[:, None]).clamp_max(self.capacity - 1)
        ends.update(zip(slots, (positions[0, :, -1] + 1).tolist()))
        return original(self, tokens, positions, slots, self.capacity, lanes)

    original = ModelRunner.forward

    def chosen(self, members, *rest):
        with monkeypatch.context() as patch:
            if members == [0]:
                patch.setattr(ModelRunner, "forward", forward)
            return feed(self, members, *rest)

    monkeypatch.setattr(Executor, "forward", chosen)


def filters_on_drafts_only(monkeypatch):
    def unfiltered(base, arms, weights, **named):
        if base.shape[1] > 1:
            named |= {"top_k": 0, "top_p": 1.0}
        return guided_sample(base, arms, weights, **named)

    monkeypatch.setattr(sampler, "guided_sample", unfiltered)


def stale_logits(monkeypatch):
    target_logits = ModelDrafter.target_logits

    def stale(self, drafts):
        return {member: each.roll(1, dims=1) for member, each in target_logits(self, drafts).items()}

    monkeypatch.setattr(ModelDrafter, "target_logits", stale)


def other_noise(monkeypatch):
    """Give drafts their own noise. The texts stay right, but hardly any draft does."""
    draft = model_drafter.tempered_draft
    for module in (model_drafter, step_graph):
        monkeypatch.setattr(
            module,
            "tempered_draft",
            lambda batch, lanes, members, positions, stream: draft(batch, lanes, members, positions + 99, stream),
        )


@pytest.mark.parametrize("broken", [None, off_by_one, no_roll_back, filters_on_drafts_only, stale_logits])
def test_faults_would_be_seen(tiny_model, tokenizer, monkeypatch, broken):
    """These are negative controls of the equality tests: each fault changes tokens."""
    model = GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer)
    prompts = random_prompts(random.Random(1), 4)
    params = {"max_new_tokens": 30, "ignore_eos": True, "seed": 4, "top_k": 8, "top_p": 0.8, "temperature": 0.7}
    plain = tokens_of(model.generate(prompts, speculation="off", **params))
    if broken is not None:
        broken(monkeypatch)
    drafted = tokens_of(model.generate(prompts, speculation=Speculation("arm", 3), **params))
    assert (drafted == plain) == (broken is None)


def test_drafts_share_the_noise_of_their_targets(tiny_model, tokenizer, monkeypatch):
    """With an ARM equal to the base q = p, so every draft is right. With separate noise few drafts would be."""
    model = GenARM.from_pretrained(tiny_model(), build_model("llama", 0), tokenizer=tokenizer)
    params = {"max_new_tokens": 60, "ignore_eos": True, "seed": 1, "temperature": 6.0}
    rounds = model.generate([5, 6, 7], speculation=Speculation("arm", 3), **params)[0].rounds
    assert rounds.accepted == rounds.drafted
    other_noise(monkeypatch)
    rounds = model.generate([5, 6, 7], speculation=Speculation("arm", 3), **params)[0].rounds
    assert rounds.accepted < 0.2 * rounds.drafted


@pytest.mark.parametrize("drafter", ["arm", "ngram"])
def test_a_cancelled_stream_leaves_nothing_behind(tiny_model, tokenizer, drafter):
    model = GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer)
    params = {"max_new_tokens": 30, "ignore_eos": True, "speculation": Speculation(drafter, 5)}
    expected = tokens_of(model.generate([[5, 6, 7], [8, 9]], seed=2, **params))
    with model.stream([5, 6, 7], seed=1, **params) as stream:
        for _ in range(4):
            next(stream)
    assert stream.output.finish_reason == "cancelled"
    assert tokens_of(model.generate([[5, 6, 7], [8, 9]], seed=2, **params)) == expected


@pytest.mark.parametrize("device", [Device, Lagging])
def test_members_are_judged_in_plain_rounds(tiny_model, tokenizer, monkeypatch, device):
    """Every token of every row judges them, a round late or not. An ARM equal to the base is right about all."""
    monkeypatch.setattr(Tuner, "choose", lambda *_: PLAIN)
    monkeypatch.setattr(Tuner, "shadow_due", lambda _: True)
    params = {"temperature": 6.0, "max_new_tokens": 30, "ignore_eos": True, "seed": 1}

    def judged():
        model = GenARM.from_pretrained(tiny_model(), build_model("llama", 0), tokenizer=tokenizer, max_batch_size=2)
        with engines_on(device()):
            model.generate([[5, 6, 7], [8, 9], [4]], speculation="auto", **params)
        return model.tuners.stats()[0]["drafters"]

    # Drafts have no times of their own in steps that are one launch: on a lagging device, in all steps but the first.
    timed = ["2"] if device is Lagging else ["1", "2"]
    for found in (judged()[name] for name in ("base", "arm")):
        assert found["drafted"] == found["accepted"] == [90, *[0] * 7]
        assert [*found["draft_seconds"]] == timed
        assert not found["verify_seconds"]
    other_noise(monkeypatch)
    assert judged()["arm"]["accepted"][0] < 20


def test_ngrams_are_judged_in_rounds_of_others(tiny_model, tokenizer, monkeypatch):
    """In plain rounds, n-grams are judged by the one token that each round settles."""
    monkeypatch.setattr(Tuner, "choose", lambda *_: PLAIN)
    model = GenARM.from_pretrained(tiny_model(seed=0), tiny_model(seed=1), tokenizer=tokenizer)
    prompts = [[5, 6, 7, 5, 6], [8, 9] * 6]
    outputs = model.generate(prompts, temperature=0, max_new_tokens=120, ignore_eos=True, speculation="auto")
    drafted = right = 0
    for prompt, output in zip(prompts, outputs):
        index = NgramIndex(prompt)
        for token in output.token_ids:
            guess = index.propose(1)
            drafted, right = drafted + len(guess), right + (guess == [token])
            index.extend([token])
    found = model.tuners.stats()[0]["drafters"]["ngram"]
    assert found["drafted"] == [drafted, *[0] * 7]
    assert found["accepted"] == [right, *[0] * 7]
    assert 0 < right < drafted
