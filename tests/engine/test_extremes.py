"""Parameters at the ends of their ranges, and independence of the process's default dtype: equal to the reference."""

from __future__ import annotations

import random

import pytest
import torch
from against_reference import assert_equals_reference, random_params
from tiny_models import build_model

from genarm_fast import GenARM, SamplingParams

GIVEN = {"weights": [0.5, -1.0], "max_new_tokens": 8}
EXTREMES = [
    {"weights": [1e30, 1.0]},
    {"weights": [-1e30, 1e-30]},
    {"weights": [[1e30, -1e30, 0.0], 1e-46]},
    {"base_weight": 1e30},
    {"base_weight": 0.0, "weights": [0.0, 0.0]},
    {"temperature": 1e30},
    {"temperature": 1e-46},
    {"temperature": -0.0},
    {"top_p": 1e-320},
    {"min_p": 1.0},
    {"top_k": 10**30},
    {"logit_bias": {5: 1e30}, "temperature": 1e-30},
    {"logit_bias": dict.fromkeys(range(300), -1e30)},
    {"frequency_penalty": -1e30},
    {"frequency_penalty": 1e30, "presence_penalty": 1e30, "repetition_penalty": 1e30},
    {"logit_bias": {5: 1e30}, "frequency_penalty": -1e30, "presence_penalty": -1e30},
    {"repetition_penalty": 1e-30},
]


@pytest.mark.parametrize("extreme", EXTREMES, ids=str)
def test_extremes(model, extreme):
    params = GIVEN | extreme
    (output,) = model.generate([5, 6, 7, 40], SamplingParams(**params, seed=3, n=2))
    assert_equals_reference(model, output, **params)


def test_penalties_of_tokens_that_the_base_masks(tiny_model, tokenizer):
    """A score of -inf times the smallest penalty is still -inf."""

    class Masking(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden).index_fill(-1, torch.tensor([7, 8]), -torch.inf)

    base = build_model("llama", 0)
    head = base.lm_head
    base.lm_head = Masking(head.in_features, head.out_features, bias=False)
    base.lm_head.weight = head.weight
    masked = GenARM.from_pretrained(base, [tiny_model(seed=1), tiny_model(seed=2)], tokenizer=tokenizer)
    params = GIVEN | {"repetition_penalty": 1e-30}
    (output,) = masked.generate([5, 7, 8], SamplingParams(**params, seed=3))
    assert_equals_reference(masked, output, **params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_of_the_process(model, dtype):
    """A load in another thread changes the default dtype for a while. In bfloat16 a penalty would have 3 digits."""

    def answers():
        found = []
        for i in range(12):
            params = SamplingParams(**random_params(random.Random(i), 2), seed=i, logprobs=2)
            (output,) = model.generate([5, 6, 7], params, logit_bias={9: 0.123456789}, frequency_penalty=0.123456789)
            found.append((output.token_ids, [token.logprob for token in output.logprobs]))
        return found

    expected = answers()
    torch.set_default_dtype(dtype)
    try:
        assert answers() == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "params",
    [
        {"suppress_tokens": range(300)},
        {"logit_bias": dict.fromkeys(range(300), -torch.inf)},
        {"suppress_tokens": range(150), "logit_bias": dict.fromkeys(range(150, 300), -torch.inf)},
        {"allowed_token_ids": [1], "min_new_tokens": 2},
        {"allowed_token_ids": [9, 9], "stop_token_ids": [9], "min_new_tokens": 1},
        {"suppress_tokens": range(2, 300), "min_new_tokens": 1, "logit_bias": {0: -torch.inf}},
        {"allowed_token_ids": [0], "stop": "<s>", "min_new_tokens": 1},
    ],
    ids=str,
)
def test_what_leaves_no_token_is_refused_before_any_work(model, params):
    with pytest.raises(ValueError, match=r"prompts\[1\]: allowed_token_ids, suppress_tokens, logit_bias and, before"):
        model.prepare(["a", "b"], [SamplingParams(), SamplingParams(**params)])
    one = {"suppress_tokens": [*range(5), *range(6, 300)], "max_new_tokens": 2, "min_new_tokens": 1}
    assert model.generate("a", **one)[0].token_ids == [5, 5]
