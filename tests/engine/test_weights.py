"""Weights for each token, a coefficient for the base, and ARMs that are the base: all compared with the reference."""

from __future__ import annotations

import random

import pytest
import torch
from against_reference import assert_equals_reference, random_prompts
from tiny_models import build_model, save_adapter

from genarm_fast import ARM, GenARM, SamplingParams, reference
from genarm_fast.engine.model_runner import ModelRunner
from genarm_fast.engine.sampler import _weighed
from genarm_fast.kernels.guided_sample.reference import combine
from genarm_fast.speculation.config import Speculation

LINES = [[2.0, [1.0, 0.0, -1.0, 0.5]], [[0.0, 0.0, 3.0], [1.5, -1.0]], [[1.0] * 5 + [0.0], 0.0], [0.5, -0.3]]
PLANS = {
    "plain": "off",
    "drafts of an ARM": Speculation(drafter="a", k=3),
    "drafts of the base": Speculation(drafter="base", k=4),
    "drafts of the text": Speculation(drafter="ngram", k=3),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "more",
    [
        {"top_k": 30, "top_p": 0.9, "temperature": 0.7, "base_weight": 0.7},
        {"logit_bias": {7: 3.0, 9: -2.0}, "min_new_tokens": 4},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {"base_weight": -0.5, "temperature": 0.0},
    ],
    ids=lambda more: "+".join(more) or "nothing",
)
def test_weights_for_each_token(plan, more, model):
    """Sequences of one batch have tables of different lengths; the output reports the weights of each token."""
    prompts = random_prompts(random.Random(len(more)), 4, longest=8)
    prompts = [[*prompt, *prompt, *prompt[:2]] for prompt in prompts]  # gives the n-gram drafter something to look up
    params = [{"weights": weights, "max_new_tokens": 10, **more} for weights in LINES]
    requests = [SamplingParams(**each, seed=i, rewards=True, logprobs=0) for i, each in enumerate(params)]
    outputs = model.generate(prompts, requests, speculation=PLANS[plan])
    for output, each in zip(outputs, params):
        assert_equals_reference(model, output, **each)
        for completion in output.completions:
            expected = [
                tuple(w[min(t, len(w) - 1)] if isinstance(w, list) else w for w in each["weights"])
                for t in range(len(completion.token_ids))
            ]
            assert completion.weights == expected
    if plan != "plain":
        assert sum(output.rounds.drafted for output in outputs) > 0


def test_an_arm_leaves_with_its_last_weight(model, monkeypatch):
    """An ARM runs as long as a later token depends on it, and no longer."""
    ran = []
    forward = ModelRunner.forward
    monkeypatch.setattr(
        ModelRunner, "forward", lambda self, *args: ran.append(self.members[0].name) or forward(self, *args)
    )
    run = {"max_new_tokens": 8, "ignore_eos": True, "seed": 1}
    model.generate([[5, 6, 7]], weights=[[0.0, 0.0, 1.0, 0.0], 0.0], **run)
    assert (ran.count("base"), ran.count("a"), ran.count("b")) == (8, 3, 0)
    assert SamplingParams(weights=[[1, 1], [2.0]]).weights == (1.0, 2.0)  # a constant list becomes a number


def test_weights_that_change_in_a_stream(model):
    """With weights by name, the other ARM keeps its list. Lists count from the first token of the response."""
    line = [0.0, 1.0, -1.0, 2.0, 0.5, 3.0]
    params = SamplingParams(weights=[0.5, line], max_new_tokens=9, temperature=0.0, ignore_eos=True)
    with model.stream([5, 6, 7], params) as stream:
        for _ in range(3):
            next(stream)
        stream.set_weights({"a": [9.0, 9.0, 9.0, -1.0, 2.0]})
        for _ in stream:
            pass
    first = [0.5] * 3 + [-1.0] + [2.0] * 5
    expected = reference.generate(
        model.base.model,
        [arm.model for arm in model.arms],
        [[5, 6, 7]] * 3,
        [first, line],
        max_new_tokens=9,
        temperature=0.0,
        vocab_size=model.vocab_size,
    )
    assert stream.output.token_ids == expected.tokens
    assert stream.output.completions[0].weights == list(zip(first, [*line, 3.0, 3.0, 3.0]))


WRONG = [
    ([1.0], "expected 2 numbers, one per ARM"),
    ([[1.0], []], "expected a number for each token, got"),
    ([[1.0], [float("nan")]], "expected finite numbers, got nan"),
    ([[1.0], ["x"]], "expected finite numbers, got 'x'"),
    ({"a": [1.0, None]}, "expected finite numbers, got None"),
    ({"a": [[1.0, 2.0], [2.0, 3.0]]}, "expected a number for each token"),
]


@pytest.mark.parametrize(("weights", "message"), WRONG, ids=str)
def test_wrong_weights(weights, message, model):
    with pytest.raises(ValueError, match=message):
        model.generate([[5, 6]], weights=weights)
    for wrong in ("1", True, float("inf")):
        with pytest.raises((TypeError, ValueError), match="base_weight="):
            SamplingParams(base_weight=wrong)


@pytest.fixture
def forwards(monkeypatch):
    """The members that ran in each forward of the decode loop."""
    seen: list[tuple[str, ...]] = []
    forward = ModelRunner.forward

    def counted(self, tokens, positions, slots, kv_bound, lanes):
        seen.append(tuple(self.members[lane].name for lane in lanes))
        return forward(self, tokens, positions, slots, kv_bound, lanes)

    monkeypatch.setattr(ModelRunner, "forward", counted)
    return seen


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """The folders of a reference model and a DPO adapter of it, and the two merged."""
    place = tmp_path_factory.mktemp("dpo")
    build_model("llama", 0).save_pretrained(place / "sft")
    tokenizer.save_pretrained(place / "sft")
    merged = save_adapter(place / "dpo", base=place / "sft", seed=2)
    return place / "sft", place / "dpo", merged


@pytest.mark.parametrize("given", ["folder", "object", "object in training"])
def test_an_implicit_reward_is_one_lane(given, folders, tokenizer, forwards):
    """The reward is log π_dpo - log π_sft over the base π_sft: base, adapter and reference take one forward of two
    lanes."""
    sft, dpo, merged = folders
    if given == "folder":
        base = sft
    else:
        base = type(merged).from_pretrained(sft).train(given == "object in training")
    arms = [ARM(dpo, weight=1.5, name="dpo"), ARM(base, weight=-1.5, name="reference")]
    model = GenARM.from_pretrained(base, arms, tokenizer=tokenizer)
    model.warm_up()  # checks all members
    line = [0.5, -2.0, 0.0]
    cases = [{}, {"weights": [1.0, line]}, {"weights": [0.0, 1.0]}, {"base_weight": 0.25, "repetition_penalty": 1.2}]
    plain = build_model("llama", 0)
    for i, case in enumerate(cases):
        forwards.clear()
        (output,) = model.generate([[5, 6, 7]], SamplingParams(**case, seed=i, max_new_tokens=9, rewards=True))
        assert set(forwards) == {("base", "dpo")}
        wanted = {"weights": [1.5, -1.5], **case}
        expected = reference.generate(
            plain, [merged, plain], [[5, 6, 7]] * 3, seed=i, stop_token_ids=[1], max_new_tokens=9, **wanted
        )
        assert output.token_ids == expected.tokens
        for place, name in enumerate(("dpo", "reference"), 1):
            assert output.rewards[name].tokens == pytest.approx([e[place] for e in expected.member_logprobs], abs=1e-4)
    forwards.clear()
    model.generate([[5, 6, 7]], max_new_tokens=3, weights=[0.0, -0.5])
    assert set(forwards) == {("base",)}
    scored = model.score([[5, 6, 7]], [[8, 9]])[0]
    assert scored.rewards["reference"].tokens == pytest.approx(scored.base_logprobs)


def test_an_arm_that_is_the_base_and_reads_another_prompt_runs(tokenizer, forwards, tiny_model):
    """The request runs in one batch with another whose prompt base and ARM read alike."""
    base = tiny_model()
    arm = ARM(base, weight=0.7, name="primed", prompt_template="the sea {prompt}")
    model = GenARM.from_pretrained(base, arm, tokenizer=tokenizer)
    params = [SamplingParams(seed=i, max_new_tokens=8, rewards=True, logprobs=0) for i in range(2)]
    ids = tokenizer("the cat")["input_ids"]
    primed = tokenizer("the sea the cat")["input_ids"]
    outputs = model.generate(["the cat", ids], params)
    for i, (output, own) in enumerate(zip(outputs, (primed, ids))):
        run = {"seed": i, "max_new_tokens": 8, "stop_token_ids": [1], "vocab_size": 300}
        expected = reference.generate(base, [base], [ids, own], [0.7], **run)
        assert output.token_ids == expected.tokens
        assert output.rewards["primed"].tokens == pytest.approx([e[1] for e in expected.member_logprobs], abs=1e-4)
    assert any("primed" in names for names in forwards)


def test_what_the_base_masks_stays_impossible():
    """The masked tokens stay impossible at any coefficient of the base; the other scores equal the reference's."""
    torch.manual_seed(0)
    base, arm = torch.randn(2, 3, 50)
    base[:, ::2] = -torch.inf
    for base_weight in (0.0, -2.0, 0.5):
        weights = torch.tensor([[base_weight, 1.3]]).expand(3, 2)
        combined, status = combine(*_weighed([base, arm], weights, False))
        assert not status.any()
        expected = reference.guided_scores(base, [arm], [1.3], base_weight)
        assert torch.allclose(combined.log_softmax(-1).double(), expected, atol=1e-5)
