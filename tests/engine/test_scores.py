"""Scores of given responses, compared with plain forwards."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import build_model

from genarm_fast import ARM, GenARM
from genarm_fast.engine.scoring import CHUNK_ELEMENTS

CHAT = [{"role": "user", "content": "hi"}]


def test_rewards_equal_scores(model):
    """Generation reports the rewards that teacher forcing gives, EOS included."""
    outputs = model.generate(
        [CHAT, "the cat", [9, 10]], seed=3, max_new_tokens=12, rewards=True, stop_token_ids=range(2, 60)
    )
    scores = model.score([o.prompt for o in outputs], [o.token_ids for o in outputs])
    assert len({len(output.token_ids) for output in outputs}) > 1
    for output, score in zip(outputs, scores):
        assert score.token_ids == output.token_ids
        for name in ("a", "b"):
            assert score.rewards[name].tokens == pytest.approx(output.rewards[name].tokens, abs=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none(tiny_model, tokenizer, value):
    """A bad logit is found at the scored token and at another token, where it would make the log-probability -inf."""
    broken = build_model("llama", 1)
    with torch.no_grad():
        hidden = broken.model(torch.tensor([[5]])).last_hidden_state[0, -1]
        broken.lm_head.weight[42] = value if value != value else hidden.sign() * 3e38  # so that the logit is +inf
    model = GenARM.from_pretrained(tiny_model(), ARM(broken, name="helpful"), tokenizer=tokenizer)
    for token in (42, 43):
        with pytest.raises(RuntimeError, match=r"responses\[0\]: NaN or \+inf logits from helpful at token 0"):
            model.score([[5]], [[token, 6]])


def test_an_eos_in_the_text_is_not_doubled(model):
    spelt, added = model.score(["the cat"] * 2, ["sat</s>", "sat"])
    assert spelt.token_ids == added.token_ids
    assert model.tokenizer.decode(added.token_ids) == "sat</s>"


@pytest.mark.parametrize("limit", [1, 3000, 1 << 24])
def test_scores(model, monkeypatch, limit):
    """Scores match plain forwards for any chunk size in which long responses are scored."""
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", limit)
    prompts, responses = ["the cat", "a", [5]], ["sat on the mat", "é" * 20, [7, 8]]
    for score, prompt, response in zip(model.score(prompts, responses), prompts, responses):
        ids = prompt if isinstance(prompt, list) else model.tokenizer(prompt)["input_ids"]
        answer = response if isinstance(response, list) else [*model.tokenizer(response)["input_ids"], 1]
        assert score.token_ids == answer
        for member, found in zip(model.members, [score.base_logprobs, *(r.tokens for r in score.rewards.values())]):
            table = member.model(torch.tensor([ids + answer])).logits[0].log_softmax(-1).detach()
            expected = [float(table[len(ids) + i - 1, token]) for i, token in enumerate(answer)]
            assert found == pytest.approx(expected, abs=1e-4)


def test_scores_over_the_common_vocabulary(tiny_model, tokenizer):
    """Probability on ids that not all members have does not count."""
    wide = tiny_model(seed=1, vocab_size=400)
    (score,) = GenARM.from_pretrained(tiny_model(), wide, tokenizer=tokenizer).score([[5, 6]], [[7]])
    expected = wide(torch.tensor([[5, 6]])).logits[0, -1, :300].log_softmax(-1)[7]
    assert score.rewards["arm"].total == pytest.approx(float(expected.detach()), abs=1e-5)


def test_score_forms(model):
    assert model.score("a", "b", append_eos=False)[0].token_ids == model.tokenizer("b")["input_ids"]
    assert model.score(CHAT, "b")[0].token_ids == [*model.tokenizer("b")["input_ids"], 1]
    assert model.score([5], [[6, 7]])[0].token_ids == [6, 7]
    assert model.score([5], [6, 7])[0].token_ids == [6, 7]
    assert model.score([5], torch.tensor([6, 7]))[0].token_ids == [6, 7]
    assert json.dumps(model.score("a", "b")[0].to_dict())


@pytest.mark.parametrize(
    ("prompts", "responses", "error", "message"),
    [
        (["a"], None, TypeError, "responses=None: expected a string, token ids"),
        (["a"], [[1.7]], TypeError, r"responses\[0\]=\[1.7\]: expected a string or token ids"),
        (["a"], [["12"]], TypeError, r"responses\[0\]=\['12'\]: expected a string or token ids"),
        (["a", "b"], ["c"], ValueError, "responses: expected 2, one per prompt, got 1"),
        (["a"], [[]], ValueError, r"responses\[0\]=\[\]: expected at least one token"),
        (["a"], [[300]], ValueError, r"responses\[0\]: token ids 300..300: expected 0..299"),
    ],
)
def test_score_refusals(model, prompts, responses, error, message):
    with pytest.raises(error, match=message):
        model.score(prompts, responses)
