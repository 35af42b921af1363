"""Whatever is asked for together, every completion is what the naive decoder gives for it alone, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_engine import assert_equals_reference
from tiny_models import build_model, save_adapter

from genarm_fast import GenARM, SamplingParams
from genarm_fast.speculation import Speculation

TOKENS = st.integers(2, 299)
WEIGHTS = st.sampled_from([0.0, 1.0, -0.7, 2.0])
REQUEST = st.fixed_dictionaries(
    {
        "prompt": st.lists(TOKENS, min_size=1, max_size=24),
        "max_new_tokens": st.integers(1, 9),
        "temperature": st.sampled_from([0.0, 0.4, 1.0, 1.7]),
        "n": st.sampled_from([1, 1, 2]),
    },
    optional={
        "top_k": st.integers(1, 40),
        "top_p": st.floats(0.3, 1.0),
        "min_p": st.floats(0.0, 0.3),
        "min_new_tokens": st.just(1),
        "stop_token_ids": st.lists(TOKENS, min_size=20, max_size=20),
        "ignore_eos": st.booleans(),
        "repetition_penalty": st.sampled_from([0.7, 1.8]),
        "logit_bias": st.dictionaries(TOKENS, st.sampled_from([3.0, -2.0, -torch.inf]), max_size=3),
        "logprobs": st.sampled_from([0, 3]),
        "rewards": st.just(True),
    },
)
ARMS = {"none": (), "lane": ("lane",), "own": ("own",), "both": ("lane", "own"), "lanes": ("lane", "lane2", "own")}


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory) -> dict[str, GenARM]:
    """ARMs in the forward of the base, and with one of their own."""
    folder = tmp_path_factory.mktemp("models")
    build_model("llama", 0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    sources: dict[str, Any] = {"own": build_model("qwen2", 3)}
    for seed, name in enumerate(["lane", "lane2"], 1):
        save_adapter(folder / name, base=folder / "base", seed=seed)
        sources[name] = folder / name
    loaded = {
        key: GenARM.from_pretrained(folder / "base", [sources[name] for name in names], dtype=torch.float32)
        for key, names in ARMS.items()
    }
    assert loaded["lane"].arms[0].shared is loaded["lane"].base.shared
    assert loaded["own"].arms[0].shared is not loaded["own"].base.shared
    return loaded


@st.composite
def runs(draw: st.DrawFn) -> tuple[str, int, list[dict[str, Any]], str | Speculation]:
    arms = draw(st.sampled_from(list(ARMS)))
    requests = draw(st.lists(REQUEST, min_size=1, max_size=5))
    common = draw(st.sampled_from([0, 0, 12]))  # a beginning that is prefilled once
    for i, request in enumerate(requests):
        request["prompt"] = [*range(20, 20 + common), *request["prompt"]]
        request["weights"] = [draw(WEIGHTS) for _ in ARMS[arms]]
        request["seed"] = draw(st.integers(0, 2**64 - 1)) + i & 2**64 - 1
    speculations = [st.just("off"), st.builds(Speculation, st.just("ngram"), st.integers(1, 6))]
    if "own" in ARMS[arms]:
        speculations += [st.builds(Speculation, st.just(name), st.integers(1, 6)) for name in ("base", "arm")]
    return arms, draw(st.integers(1, 4)), requests, draw(st.one_of(speculations))


def check(models: dict[str, GenARM], run: tuple[str, int, list[dict[str, Any]], str | Speculation]) -> None:
    arms, rows, requests, speculation = run
    model = models[arms]
    model.max_batch_size = rows
    prompts = [request["prompt"] for request in requests]
    params = [{name: value for name, value in request.items() if name != "prompt"} for request in requests]
    outputs = model.generate(prompts, [SamplingParams(**each) for each in params], speculation=speculation)
    for prompt, output, each in zip(prompts, outputs, params):
        assert output.prompt_token_ids == prompt
        assert len(output.completions) == each["n"]
        assert output.completions[0].seed == each["seed"]
        known = {name: value for name, value in each.items() if name not in ("n", "seed", "logprobs", "rewards")}
        assert_equals_reference(model, output, **known)


def fuzz(models: dict[str, GenARM], examples: int, **options: Any) -> None:
    once = settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        **options,
    )
    once(given(runs())(lambda run: check(models, run)))()


def test_equals_the_reference(models):
    fuzz(models, 25)


@pytest.mark.usefixtures("neighbourly_noise")
def test_a_fault_would_be_seen(models):
    """Negative control."""
    with pytest.raises(AssertionError):
        fuzz(models, 25, phases=[Phase.generate])
