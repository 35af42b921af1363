"""Counts of whole texts from drafted decoding, compared with the law computed by enumerating every prefix."""

from __future__ import annotations

import random
from collections import Counter
from math import prod, sqrt

import pytest
import torch
from doubles import Lagging, engines_on

from genarm_fast import GenARM, SamplingParams
from genarm_fast.engine.sampler import Sampler
from genarm_fast.reference import guided_probs
from genarm_fast.speculation.config import Speculation

PROMPT, LENGTH = [5, 6, 7], 3
WEIGHT, FILTERS = 0.8, {"temperature": 1.3, "top_k": 4}


@pytest.fixture
def model(tiny_model, tokenizer):
    settings = {"initializer_range": 0.15}  # a flatter distribution, so that no text has most of the mass
    return GenARM.from_pretrained(
        tiny_model(**settings), tiny_model(seed=1, **settings), tokenizer=tokenizer, max_batch_size=100
    )


@torch.no_grad()
def law(model: GenARM) -> dict[tuple[int, ...], float]:
    """Return every possible text with its probability."""
    texts: dict[tuple[int, ...], list[float]] = {(): []}
    for _ in range(LENGTH):
        ids = torch.tensor([[*PROMPT, *text] for text in texts])
        base, arm = (member.model(ids).logits[:, -1] for member in model.members)
        probs = guided_probs(base, [arm], [WEIGHT], **FILTERS)
        texts = {
            (*text, int(token)): [*factors, float(line[token])]
            for (text, factors), line in zip(texts.items(), probs)
            for token in line.nonzero()[:, 0]
        }
    return {text: prod(factors) for text, factors in texts.items()}


def surprise(model: GenARM, drafter: str, draws: int = 3000) -> float:
    """Return chi-square divided by its bound at p = 0.001. Texts expected less than five times form one bin."""
    params = SamplingParams(n=draws, seed=1, max_new_tokens=LENGTH, ignore_eos=True, weights=WEIGHT, **FILTERS)
    output = model.generate([PROMPT], params, speculation=Speculation(drafter, 2))[0]
    assert 0.1 < output.rounds.accepted / output.rounds.drafted < 0.9
    found = Counter(tuple(completion.token_ids) for completion in output.completions)
    expected = {text: draws * p for text, p in law(model).items()}
    bins = [(found[text], mean) for text, mean in expected.items() if mean >= 5]
    bins.append((draws - sum(count for count, _ in bins), max(draws - sum(mean for _, mean in bins), 1.0)))
    statistic = sum((count - mean) ** 2 / mean for count, mean in bins)
    degrees = len(bins) - 1
    assert degrees > 20
    return statistic / (degrees * (1 - 2 / (9 * degrees) + 3.09 * sqrt(2 / (9 * degrees))) ** 3)


@pytest.mark.parametrize("drafter", ["arm", "base"])
def test_drafted_texts_follow_the_law(model, drafter):
    assert surprise(model, drafter) < 1


def test_texts_drafted_ahead_follow_the_law(model):
    with engines_on(Lagging()):
        assert surprise(model, "arm", 800) < 1


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_drafts_settled_without_verification_are_noticed(model, monkeypatch, share):
    """The fault keeps possible drafts at random: the texts are possible, but too many are the drafter's."""
    rng, sample = random.Random(0), Sampler.sample
    possible = {text[: n + 1] for text in law(model) for n in range(LENGTH)}

    def faulty(self, batch, logits, drafts):
        result = sample(self, batch, logits, drafts)
        for row, (sequence, tokens) in enumerate(zip(batch.sequences, drafts.tokens)):
            if tokens and (*sequence.tokens, tokens[0]) in possible and rng.random() < share:
                result.tokens[row, 0] = tokens[0]
        return result

    monkeypatch.setattr(Sampler, "sample", faulty)
    assert surprise(model, "arm") > 1
