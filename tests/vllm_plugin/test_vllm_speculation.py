"""Drafts change no token, greedy or sampled: the token kept is always the target's draw."""

from __future__ import annotations

import pytest
from engines import PROMPTS, asking, engine, generated, loaded, naive, own_engine

from genarm_fast import SamplingParams
from genarm_fast.integrations.vllm import drafts

TOKENS = 16
DRAFTERS = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
    "ARM": {"method": "draft_model", "num_speculative_tokens": 3},
}


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_drafts_change_no_token(drafter, models):
    plan = DRAFTERS[drafter] | ({"model": str(models / "small")} if drafter == "ARM" else {})
    weights = [[1.0], [0.0], [0.7], [2.5]]
    members = [loaded(models, "base"), loaded(models, "small")]
    with engine(models, ["small"], speculative_config=plan, disable_log_stats=False) as llm:
        found = generated(llm, PROMPTS, [asking(each, max_tokens=TOKENS) for each in weights])
        drawn = generated(
            llm, PROMPTS, [asking(w, max_tokens=TOKENS, temperature=0.8, seed=i) for i, w in enumerate(weights)]
        )
        counted = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    for prompt, each, tokens in zip(PROMPTS, weights, found):
        assert tokens == naive(members, prompt, each, TOKENS)
    assert found[3] != naive(members, PROMPTS[3], weights[2], TOKENS)
    ours = own_engine(models, ["small"])
    here = [
        SamplingParams(weights=w, seed=i, max_new_tokens=TOKENS, ignore_eos=True, temperature=0.8)
        for i, w in enumerate(weights)
    ]
    assert drawn == [list(output.token_ids) for output in ours.generate(PROMPTS, here)]
    others = [params.override(seed=params.seed + 9) for params in here]
    assert drawn != [list(output.token_ids) for output in ours.generate(PROMPTS, others)]
    assert counted["vllm:spec_decode_num_drafts"] > 0
    if drafter == "ARM":
        assert 0 < counted["vllm:spec_decode_num_accepted_tokens"] < counted["vllm:spec_decode_num_draft_tokens"]


def test_drafts_of_an_arm_are_tempered(models):
    """Drafts are tempered to the weight of all members, with the target's noise: more are right, and the text stays.

    The same engine compares them with vLLM's own drafts, the most probable tokens, which at T = 2 are seldom drawn.
    """
    plan = {"method": "draft_model", "num_speculative_tokens": 3, "model": str(models / "small")}
    params = [asking([w], max_tokens=TOKENS, temperature=2.0, seed=i) for i, w in enumerate((0.0, 0.5, 0.5, 1.0))]
    with engine(models, ["small"], speculative_config=plan, disable_log_stats=False) as llm:

        def run():
            before = accepted(llm)
            tokens = generated(llm, PROMPTS, params)
            return tokens, accepted(llm) - before

        tokens, tempered = run()
        drafts._states.clear()
        same, greedy = run()
    assert tokens == same
    assert tempered > 2 * greedy + 2, (tempered, greedy)  # 16 tempered drafts are kept, and 5 of vLLM's own


def accepted(llm):
    (found,) = (each.value for each in llm.get_metrics() if each.name == "vllm:spec_decode_num_accepted_tokens")
    return found
