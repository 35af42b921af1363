"""A base and three ARMs of other families, sizes and vocabularies in one engine, compared with the reference and
GenARM."""

from __future__ import annotations

import pytest
import torch
from engines import PROMPTS, TOKENIZER, asking, engine, generated, loaded, naive, own_engine
from vllm.exceptions import VLLMValidationError

from genarm_fast import ARM, SamplingParams
from genarm_fast.integrations.vllm import sampler
from genarm_fast.integrations.vllm.member_logits import MemberLogits
from genarm_fast.kernels import guided_sample

ARMS = ["qwen", "padded", "window"]
DEFAULTS = [0.8, 1.0, -0.4]
WEIGHTS = [None, [0.0, 0.0, 0.0], [0.7, -0.3, 1.3], [2.5, 0.5, -1.0]]
TOKENS = 16
SAMPLED = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 0.9, "top_k": 60, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 0.0},
]
ADJUSTED = [
    {"repetition_penalty": 1.4},
    {"frequency_penalty": 0.7, "presence_penalty": -0.5},
    {"logit_bias": {70: 4.0, 105: -6.0}},
    {"allowed_token_ids": list(range(60, 120))},
    {"repetition_penalty": 0.8, "frequency_penalty": 1.0, "top_p": 0.8},
]


@pytest.fixture(scope="module")
def llm(models):
    arms = [ARM(models / name, name=name, weight=weight) for name, weight in zip(ARMS, DEFAULTS)]
    with engine(models, arms, weight_range=(-5, 5)) as made:
        yield made


@pytest.fixture(scope="module")
def members(models):
    return [loaded(models, name) for name in ("base", *ARMS)]


@pytest.fixture(scope="module")
def ours(models):
    return own_engine(models, ARMS)


def test_greedy_is_the_reference(llm, members):
    found = generated(llm, PROMPTS, [asking(weights, max_tokens=TOKENS) for weights in WEIGHTS])
    for prompt, weights, tokens in zip(PROMPTS, WEIGHTS, found):
        assert tokens == naive(members, prompt, weights or DEFAULTS, TOKENS)
    assert found[2] != naive(members, PROMPTS[2], WEIGHTS[2][::-1], TOKENS)
    assert found[0] != naive(members[:1], PROMPTS[0], [], TOKENS)


def test_weights_by_name(llm, members):
    named = asking({"arm_weights.window": 1.5, "arm_weights.qwen": -0.5}, max_tokens=TOKENS)
    (found,) = generated(llm, PROMPTS[:1], named)
    assert found == naive(members, PROMPTS[0], [-0.5, 1.0, 1.5], TOKENS)
    assert found != naive(members, PROMPTS[0], [1.5, 1.0, -0.5], TOKENS)


def assert_same(llm, ours, kinds, tokens=TOKENS):
    """Check that vLLM and GenARM give the same tokens for the same seeds, and other tokens for other seeds."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(kinds))]
    weights = [[1.0, 0.5, -0.2] if i % 2 else [0.3, 0.0, 1.1] for i in range(len(kinds))]
    seeds = [7 + 2**62 * (i % 2) + i for i in range(len(kinds))]
    there = [
        asking(w, max_tokens=tokens, **({"temperature": 1.0, "seed": s} | kind))
        for w, s, kind in zip(weights, seeds, kinds)
    ]
    here = [
        SamplingParams(weights=w, seed=s, max_new_tokens=tokens, ignore_eos=True, **kind)
        for w, s, kind in zip(weights, seeds, kinds)
    ]
    found = generated(llm, prompts, there)
    assert found == [list(output.token_ids) for output in ours.generate(prompts, here)]
    others = [params.override(seed=params.seed + 1) for params in here]
    assert found != [list(output.token_ids) for output in ours.generate(prompts, others)]


def test_penalties_bias_and_allowed_tokens_act_as_in_genarm(llm, ours):
    assert_same(llm, ours, ADJUSTED)


@pytest.fixture
def draws(monkeypatch):
    """The number of members' logits that each call of `guided_sample` read: 1 if they were combined before."""
    counts = []

    def counted(base, arms, weights, **options):
        counts.append(1 + len(arms))
        return guided_sample(base, arms, weights, **options)

    monkeypatch.setattr(sampler, "guided_sample", counted)
    return counts


def test_same_seed_same_tokens(llm, ours, draws, monkeypatch):
    """The tokens agree for one read of the members' own logits, and through a combined tensor."""
    assert_same(llm, ours, SAMPLED)
    assert set(draws) == {1 + len(ARMS)}
    draws.clear()
    monkeypatch.setattr(sampler.GuidedSampler, "takes_members", lambda self, requests: False)
    assert_same(llm, ours, SAMPLED)
    assert set(draws) == {1}


def test_exchanged_members_are_noticed(llm, ours, monkeypatch):
    """This is the control of the test above: ARMs' logits under each other's weights give other tokens."""
    right = MemberLogits.__init__

    def exchanged(self, base, arms, *rest):
        right(self, base, arms[::-1], *rest)

    monkeypatch.setattr(MemberLogits, "__init__", exchanged)
    with pytest.raises(AssertionError):
        assert_same(llm, ours, SAMPLED[:2])


READERS = [{"logprobs": 0}, {"repetition_penalty": 1.1}, {"logit_bias": {70: 1.0}}, {"bad_words": ["the"]}]


@pytest.mark.parametrize("asked", READERS)
def test_what_reads_combined_logits_gets_them(llm, draws, asked):
    """The batch also has a request that does not need combined logits."""
    requests = [asking([0.5, 0.5, 0.5], max_tokens=3, **each) for each in ({}, asked)]
    assert all(len(tokens) == 3 for tokens in generated(llm, PROMPTS[:2], requests))
    assert 1 in draws


def test_log_probabilities_are_the_guided_ones(llm, members):
    weights = [0.7, -0.3, 1.3]
    asked = asking(weights, max_tokens=TOKENS, logprobs=2, prompt_logprobs=1)
    (output,) = llm.generate([{"prompt_token_ids": PROMPTS[3]}], asked, use_tqdm=False)
    tokens = list(output.outputs[0].token_ids)
    rows = torch.tensor([[*PROMPTS[3], *tokens]])
    with torch.no_grad():
        own = [member(rows).logits[0, :, :300].double().log_softmax(-1) for member in members]
    guided = (own[0] + sum(w * each for w, each in zip(weights, own[1:]))).log_softmax(-1)
    first = len(PROMPTS[3])
    at = list(enumerate(zip(tokens, output.outputs[0].logprobs), first - 1))
    assert [d[t].logprob for _, (t, d) in at] == pytest.approx([float(guided[i, t]) for i, (t, _) in at], abs=1e-4)
    assert [d[t].logprob for _, (t, d) in at] != pytest.approx([float(own[0][i, t]) for i, (t, _) in at], abs=1e-1)
    prompt = [(i, t, d[t].logprob) for i, (t, d) in enumerate(zip(PROMPTS[3], output.prompt_logprobs)) if d]
    assert [p for *_, p in prompt] == pytest.approx([float(guided[i - 1, t]) for i, t, _ in prompt], abs=1e-4)
    assert [p for *_, p in prompt] != pytest.approx([float(own[0][i - 1, t]) for i, t, _ in prompt], abs=1e-1)


def test_rewards_are_the_arms_own_log_probabilities(llm, members):
    """The batch also has a guided request, whose tokens stay the same."""
    guided = asking([0.7, -0.3, 1.3], max_tokens=4)
    (plain,) = generated(llm, PROMPTS[:1], guided)
    params = [asking({"arm_reward": name}, max_tokens=1, prompt_logprobs=0) for name in ARMS]
    prompts = [{"prompt_token_ids": ids} for ids in (*[PROMPTS[3]] * len(ARMS), PROMPTS[0])]
    *scored, output = llm.generate(prompts, [*params, guided], use_tqdm=False)
    assert list(output.outputs[0].token_ids) == plain
    rows, targets = torch.tensor([PROMPTS[3]]), torch.tensor(PROMPTS[3][1:])
    with torch.no_grad():
        own = [member(rows).logits[0, :-1, :300].double().log_softmax(-1) for member in members]
    expected = [each.gather(1, targets[:, None])[:, 0] for each in own]
    for score, right, other in zip(scored, expected[1:], expected):
        pairs = zip(PROMPTS[3][1:], score.prompt_logprobs[1:])
        found = torch.tensor([row[token].logprob for token, row in pairs], dtype=torch.float64)
        torch.testing.assert_close(found, right, atol=1e-4, rtol=0)
        assert not torch.allclose(found, other, atol=1e-1)


def test_grammars_hold(llm):
    from vllm.sampling_params import StructuredOutputsParams

    choices = StructuredOutputsParams(choice=["the sea", "no mat"])
    asked = asking([1.0, 0.5, 0.2], structured_outputs=choices, ignore_eos=False, temperature=1.0, seed=3)
    (output,) = llm.generate([{"prompt_token_ids": PROMPTS[0]}], asked, use_tqdm=False)
    assert TOKENIZER.decode(output.outputs[0].token_ids, skip_special_tokens=True) in ("the sea", "no mat")


@pytest.mark.parametrize(
    "wrong",
    [
        [1.0],
        {"arm_weights": "x"},
        {"arm_weights.nobody": 1.0},
        {"arm_reward": "nobody"},
        {"arm_reward": "qwen"},
        [9.0, 0.0, 0.0],
    ],
)
def test_wrong_weights_are_refused_and_the_engine_lives_on(llm, wrong):
    with pytest.raises(VLLMValidationError, match=r"arm_(weights: |reward).*expected"):
        generated(llm, PROMPTS[:1], asking(wrong))
    assert len(generated(llm, PROMPTS[:1], asking([0.5, 0.5, 0.5], max_tokens=2))[0]) == 2
