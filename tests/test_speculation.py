"""Drafting never changes a token: equality with plain decoding, and with the naive reference, in float32."""

from __future__ import annotations

import random

import pytest
from test_engine import assert_equals_reference, random_params, random_prompts

from genarm_fast import GenARM, SamplingParams
from genarm_fast.speculation import Speculation


def tokens_of(outputs):
    return [[completion.token_ids for completion in output.completions] for output in outputs]


@pytest.mark.parametrize("case", range(24))
def test_equals_plain_decoding(tiny_model, tokenizer, case):
    """Every drafter, any K, ragged batches with parameters of their own, slots used again."""
    rng = random.Random(case)
    arms = [tiny_model(seed=i + 1) for i in range(case % 3)]
    model = GenARM.from_pretrained(tiny_model(seed=0), arms, tokenizer=tokenizer, max_batch_size=rng.randint(1, 4))
    prompts = random_prompts(rng, rng.randint(1, 6))
    params = [random_params(rng, len(arms)) for _ in prompts]
    shown = {"rewards": rng.random() < 0.5, "logprobs": rng.choice([None, 0, 3]), "n": rng.randint(1, 2)}
    requests = [SamplingParams(**each, seed=rng.getrandbits(64), **shown) for each in params]
    plain = tokens_of(model.generate(prompts, requests, speculation="off"))
    names = ["ngram", "base", *model.arm_names] if arms else ["ngram"]
    for name in names:
        outputs = model.generate(prompts, requests, speculation=Speculation(name, rng.randint(1, 8)))
        assert tokens_of(outputs) == plain
    for output, each in zip(outputs, params):
        assert_equals_reference(model, output, **each)
