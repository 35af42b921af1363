"""The logits processor inside Hugging Face's `generate`: every score is compared with plain forwards over whole
rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from guided_rows import PAD, PROMPTS, WEIGHTS, Checked, generate
from tiny_models import build_model
from transformers import LogitNormalization, RepetitionPenaltyLogitsProcessor

from genarm_fast import GenARM, reference
from genarm_fast.integrations import transformers as integration
from genarm_fast.integrations.transformers import GenARMLogitsProcessor

FAMILIES = ["llama", "gpt2", "mistral", "qwen3", "gemma2", "gemma3_text"]  # three of them have windows of 8 tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_that_of_the_engine_and_of_the_reference(family, tiny_model, padded_tokenizer):
    base, arms = tiny_model(family), [tiny_model(family, seed=1), tiny_model("llama", seed=2)]
    base.generation_config.pad_token_id = PAD
    guide = GenARMLogitsProcessor(base, arms, weights=WEIGHTS, tokenizer=padded_tokenizer)
    found = generate(base, guide, PROMPTS)
    engine = GenARM.from_pretrained(base, arms, tokenizer=padded_tokenizer)
    run = {"temperature": 0.0, "max_new_tokens": 12}
    assert found == [output.token_ids for output in engine.generate(PROMPTS, weights=WEIGHTS, **run)]
    for prompt, tokens in zip(PROMPTS, found):
        assert tokens == reference.generate(base, arms, [prompt] * 3, WEIGHTS, stop_token_ids=[1], **run).tokens
    assert found != generate(base, guide.__class__(base, [], tokenizer=padded_tokenizer), PROMPTS)


WAYS = {
    "batch": {},
    "one": {"prompts": PROMPTS[:1]},
    "sampled": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "several beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "prompt lookup": {"prompts": [[5, 6, 7, 5, 6, 7, 5, 6]], "prompt_lookup_num_tokens": 3},
    "assistant": {"prompts": PROMPTS[:1], "assistant": 3},
    "sampled assistant": {"prompts": PROMPTS[:1], "assistant": 3, "do_sample": True},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_score_is_that_of_plain_forwards(way, guide, base, tiny_model):
    torch.manual_seed(0)
    checked, kwargs = Checked(guide), dict(WAYS[way])
    prompts = kwargs.pop("prompts", PROMPTS)
    if "assistant" in kwargs:
        kwargs["assistant_model"] = tiny_model(seed=kwargs.pop("assistant"))
    generate(base, checked, prompts, **kwargs)
    assert checked.steps >= 12
    longest = max(map(len, prompts))
    if "assistant_model" not in kwargs and "prompt_lookup_num_tokens" not in kwargs:
        assert checked.counted.columns == longest + checked.steps - 1  # feeds each token once


def test_an_assistant_changes_nothing(guide, base, tiny_model):
    plain = generate(base, guide, PROMPTS[:1])
    assert generate(base, guide, PROMPTS[:1], assistant_model=tiny_model(seed=3)) == plain
    assert generate(base, guide, PROMPTS[:1], prompt_lookup_num_tokens=2) == plain


def test_calls_after_calls(guide, base):
    """Fewer rows, more rows and repeated rows are read again; of a row that continues, only the new tokens are."""
    checked = Checked(guide)

    def fed(prompts: Sequence[Sequence[int]], new: int) -> int:
        before, steps = checked.counted.columns, checked.steps
        generate(base, checked, prompts, max_new_tokens=new, min_new_tokens=new)
        assert checked.steps == steps + new
        return checked.counted.columns - before

    for prompts in (PROMPTS, PROMPTS[:1], [[20, 21], *PROMPTS], PROMPTS[::-1], [*PROMPTS[::-1], PROMPTS[0]]):
        assert fed(prompts, 4) == 6 + 4 - 1
    (text,) = generate(base, checked, PROMPTS[:1])
    longer = [*PROMPTS[0], *text, 30, 31]
    assert fed([longer], 4) == 3 + 4 - 1  # the last token of the text was not fed before
    (text,) = generate(base, checked, [longer])
    longer = [*longer, *text, 40]
    assert fed([longer, longer[::-1]], 4) == len(longer) + 4 - 1  # one of the rows does not continue


def test_an_arm_may_be_trained_between_calls(base, padded_tokenizer):
    arm = build_model("llama", 1)
    checked = Checked(GenARMLogitsProcessor(base, arm, tokenizer=padded_tokenizer))
    first = generate(base, checked, PROMPTS)
    for parameter in arm.parameters():
        parameter.data *= 1.5
    assert generate(base, checked, PROMPTS) != first
    arm.model.norm.weight.data *= 1.5
    generate(base, checked, [[*PROMPTS[0][:4], 30, 31, 32, 33]])


def test_faults_would_be_seen(guide, base, monkeypatch):
    """Two faults are injected: reordered rows that keep their old caches, and caches reused for another prompt."""
    right = integration.parents_of

    def in_place(tokens, rows):
        parents, kept = right(tokens, rows)
        return list(range(len(parents))), kept

    monkeypatch.setattr(integration, "parents_of", in_place)
    with pytest.raises(AssertionError):
        generate(base, Checked(guide), PROMPTS, num_beams=4)

    def by_length(tokens, rows):
        return right(tokens, rows)[0], min(tokens.shape[1] - 1, rows.shape[1])

    guide.release()
    generate(base, Checked(guide), PROMPTS[:1])
    monkeypatch.setattr(integration, "parents_of", by_length)
    with pytest.raises(AssertionError):
        generate(base, Checked(guide), [[5, 6, 30, 31, 32, 33, 34, 35]])


def test_a_forward_that_failed_leaves_nothing_behind(guide, base, monkeypatch):
    first = generate(base, guide, PROMPTS)
    arm = guide.members[1].model
    with monkeypatch.context() as patch:
        patch.setattr(arm.lm_head, "forward", lambda x: 1 / 0)  # the cache has grown by then
        with pytest.raises(ZeroDivisionError):
            guide(torch.tensor([[5, 6, 7]]), torch.zeros(1, 300))
    assert generate(base, Checked(guide), PROMPTS) == first


def test_weights_change_between_tokens(guide, base, tiny_model):
    class Steered(Checked):
        def __call__(self, input_ids, scores):
            self.guide.weights = weights(self.steps)
            return super().__call__(input_ids, scores)

    def weights(step: int) -> list[float]:
        return [0.0, 2.0] if step < 5 else [3.0, 0.0]  # an ARM of weight 0 doesn't run, and catches up later

    found = generate(base, Steered(guide), PROMPTS[:1])[0]
    arms = [tiny_model(seed=1), tiny_model(seed=2)]
    run = {"temperature": 0.0, "max_new_tokens": 12, "stop_token_ids": [1]}
    assert found == reference.generate(base, arms, [PROMPTS[0]] * 3, weights, **run).tokens
    for wrong in ([1.0], [1.0, math.nan], "1"):
        with pytest.raises((ValueError, TypeError), match="weights="):
            guide.weights = wrong
    guide.weights = 2
    assert guide.weights == (2.0, 2.0)


def test_warpers_act_on_the_combination(guide, base, tiny_model):
    torch.manual_seed(1)
    warp = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
    options = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 6, "do_sample": True}
    output = base.generate(torch.tensor([PROMPTS[0]]), logits_processor=[guide], **warp, **options)
    for step, scores in enumerate(output.scores):
        row = output.sequences[:, : len(PROMPTS[0]) + step]
        logits = [model(row).logits[0, -1].detach() for model in (base, tiny_model(seed=1), tiny_model(seed=2))]
        expected = reference.guided_probs(logits[0], logits[1:], WEIGHTS, **warp)
        assert torch.allclose(scores[0].double().softmax(-1), expected, atol=1e-4)
        assert 1 < int((expected > 0).sum()) <= 40 or step


def test_penalties_after_it_are_those_of_the_engine(guide, base):
    """Penalties act on normalised log-probabilities. Placed before the guide, as `generate` does, they give other
    texts."""
    engine = GenARM(guide.members)
    run = {"temperature": 0.0, "max_new_tokens": 12, "repetition_penalty": 1.3}
    expected = [output.token_ids for output in engine.generate(PROMPTS, **run)]
    penalty = RepetitionPenaltyLogitsProcessor(1.3)
    after, before = [guide, LogitNormalization(), penalty], [penalty, guide]
    assert [generate(base, after, [prompt])[0] for prompt in PROMPTS] == expected
    assert [generate(base, before, [prompt])[0] for prompt in PROMPTS] != expected
