"""The naive reference's answers, which the fast engine must equal, and random requests to compare them on."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from genarm_fast import GenARM, SamplingParams, reference
from genarm_fast.outputs import Completion, GenerationOutput


def reference_completion(model: GenARM, output: GenerationOutput, completion: Completion, **params: Any):
    """Return the naive decoder's answer to the request behind a completion."""
    prompts = [output.prompt_token_ids] * len(model.members)
    eos = set() if params.pop("ignore_eos", False) else model.eos_token_ids
    params["stop_token_ids"] = [*eos, *params.get("stop_token_ids", ())]
    return reference.generate(
        model.base.model,
        [arm.model for arm in model.arms],
        params.pop("prompts", prompts),
        params.pop("weights"),
        seed=completion.seed,
        vocab_size=model.vocab_size,
        **params,
    )


def assert_equals_reference(model: GenARM, output: GenerationOutput, **params: Any) -> None:
    for completion in output.completions:
        expected = reference_completion(model, output, completion, **params)
        assert completion.token_ids == expected.tokens
        if completion.logprobs is not None:
            assert [t.logprob for t in completion.logprobs] == pytest.approx(expected.logprobs, abs=1e-4)
        if completion.rewards is not None:
            for i, name in enumerate(model.arm_names):
                rewards = [values[i + 1] for values in expected.member_logprobs]
                assert completion.rewards[name].tokens == pytest.approx(rewards, abs=1e-4)


def random_prompts(rng: random.Random, count: int, longest: int = 20) -> list[list[int]]:
    return [[rng.randrange(2, 300) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def random_batch(rng: random.Random, tiny_model: Any, tokenizer: Any, arms: int, most: int):
    """Return a model with `arms` ARMs, at most `most` prompts, the reference's parameters of each, and the requests."""
    models = [tiny_model(seed=i + 1) for i in range(arms)]
    model = GenARM.from_pretrained(tiny_model(seed=0), models, tokenizer=tokenizer, max_batch_size=rng.randint(1, 4))
    prompts = random_prompts(rng, rng.randint(1, most))
    params = [random_params(rng, arms) for _ in prompts]
    shown = {"rewards": rng.random() < 0.5, "logprobs": rng.choice([None, 0, 3]), "n": rng.randint(1, 2)}
    return model, prompts, params, [SamplingParams(**each, seed=rng.getrandbits(64), **shown) for each in params]


def random_params(rng: random.Random, arms: int) -> dict[str, Any]:
    """Return random parameters that the reference supports; each keeps its default about half of the time."""

    def maybe(value: Any, default: Any) -> Any:
        return value if rng.random() < 0.4 else default

    params = {
        "weights": [rng.choice([0.0, 0.5, 1.0, -0.7, 2.0]) for _ in range(arms)],
        "temperature": rng.choice([0.0, 0.3, 1.0, 1.7]),
        "top_k": maybe(rng.randint(1, 40), 0),
        "top_p": maybe(rng.uniform(0.3, 1.0), 1.0),
        "min_p": maybe(rng.uniform(0.0, 0.3), 0.0),
        "max_new_tokens": rng.randint(1, 14),
        "min_new_tokens": maybe(1, 0),
        "stop_token_ids": maybe([rng.randrange(2, 300) for _ in range(30)], []),
        "ignore_eos": maybe(True, False),
        "repetition_penalty": maybe(rng.uniform(0.7, 1.8), 1.0),
        "logit_bias": maybe({rng.randrange(300): rng.choice([3.0, -2.0, -torch.inf]) for _ in range(4)}, None),
    }
    # A second generator draws the parameters below, so that a new one leaves the cases above as they are: some tests
    # depend on them.
    more = random.Random(repr(params))
    if params["repetition_penalty"] != 1.0:  # a repetition penalty reads each token on the host anyway
        params |= {
            "frequency_penalty": more.choice([0.0, 1.5, -0.5]),
            "presence_penalty": more.choice([0.0, 2.0, -1.0]),
        }
    if more.random() < 0.2:
        params["allowed_token_ids"] = more.sample(range(2, 300), 120)
    if more.random() < 0.2:
        params["base_weight"] = more.choice([0.0, 0.5, -1.0, 2.0])
    if more.random() < 0.3:
        params["weights"] = [
            more.choice([weight, [more.choice([0.0, 0.5, -0.7, 2.0]) for _ in range(more.randint(1, 9))]])
            for weight in params["weights"]
        ]
    if more.random() < 0.2:
        params["suppress_tokens"] = [more.randrange(2, 300) for _ in range(9)]
    return params
