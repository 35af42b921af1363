"""LoRA ARMs in the base's own forward, beside an ARM with separate weights, eager and compiled."""

from __future__ import annotations

import pytest
from engines import PROMPTS, asking, engine, generated, loaded, naive, own_engine
from test_composite import assert_same

ARMS = ["lora0", "qwen", "lora1"]  # weights come in the order of the ARMs, lanes or not
WEIGHTS = [None, [0.0, 0.0, 0.0], [0.7, -0.3, 1.3], [2.5, 0.5, -1.0]]
TOKENS = 16


@pytest.fixture(scope="module")
def llm(models):
    with engine(models, ARMS) as made:
        yield made


def test_greedy_is_the_reference(llm, models):
    members = [loaded(models, name) for name in ("base", *ARMS)]
    found = generated(llm, PROMPTS, [asking(weights, max_tokens=TOKENS) for weights in WEIGHTS])
    for prompt, weights, tokens in zip(PROMPTS, WEIGHTS, found):
        assert tokens == naive(members, prompt, weights or [1.0] * 3, TOKENS)
    assert found[3] != naive(members, PROMPTS[3], WEIGHTS[3][::-1], TOKENS)  # the lanes exchanged


def test_same_seed_same_tokens(llm, models):
    assert_same(llm, own_engine(models, ARMS), [{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}])


def test_compiled(models):
    """Prompts have more rows, over all lanes, than a step has tokens: such shapes are compiled too."""
    members = [loaded(models, name) for name in ("base", "lora0", "lora1")]
    weights = [[0.7, -0.3], [2.5, 0.5], [0.0, 1.0], [1.0, 1.0]]
    options = {"enforce_eager": False, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    with engine(models, ["lora0", "lora1"], **options) as llm:
        prompts = [prompt * 3 for prompt in PROMPTS]
        found = generated(llm, prompts, [asking(each, max_tokens=TOKENS) for each in weights])
    for prompt, each, tokens in zip(prompts, weights, found):
        assert tokens == naive(members, prompt, each, TOKENS)
    assert found[0] != naive(members, prompts[0], weights[0][::-1], TOKENS)
