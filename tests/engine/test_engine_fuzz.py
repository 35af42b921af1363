"""Every completion of a random mix of requests equals what the naive decoder gives for it alone, in float32.

The requests run as one call, or as a stream whose weights change. Drafters and chunk sizes vary, and other calls have
used the caches before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from against_reference import assert_equals_reference
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny_models import build_model, save_adapter

from genarm_fast import GenARM, SamplingParams
from genarm_fast.engine import scheduler
from genarm_fast.outputs import GenerationOutput
from genarm_fast.speculation.config import Speculation


def unlike_the_last(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A processor that depends on the last token."""
    return scores.index_add(1, input_ids[0, -1:], torch.tensor([[-3.0]]))


TOKENS = st.integers(2, 299)
PROMPTS = st.one_of(
    st.lists(TOKENS, min_size=1, max_size=24),
    st.builds(lambda tokens, times: tokens * times, st.lists(TOKENS, min_size=1, max_size=4), st.integers(2, 6)),
)
WEIGHTS = st.sampled_from([0.0, 1.0, -0.7, 2.0])
REQUEST = st.fixed_dictionaries(
    {
        "prompt": PROMPTS,
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
        "frequency_penalty": st.sampled_from([1.5, -0.5]),
        "presence_penalty": st.sampled_from([2.0, -1.0]),
        "allowed_token_ids": st.just(list(range(2, 300, 3))),
        "suppress_tokens": st.just(list(range(5, 300, 7))),
        "logit_bias": st.dictionaries(TOKENS, st.sampled_from([3.0, -2.0, -torch.inf]), max_size=3),
        "logprobs": st.sampled_from([0, 3]),
        "rewards": st.just(True),
        "logits_processors": st.just([unlike_the_last]),
    },
)
ARMS = {"none": (), "lane": ("lane",), "own": ("own",), "both": ("lane", "own"), "lanes": ("lane", "lane2", "own")}


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory) -> dict[str, GenARM]:
    """GenARMs by the kinds of their ARMs: ARMs that are lanes of the base's forward, and ARMs with a forward of their
    own."""
    folder = tmp_path_factory.mktemp("models")
    build_model("llama", 0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    sources: dict[str, Any] = {"own": build_model("qwen2", 3)}
    for seed, name in enumerate(["lane", "lane2"], 1):
        save_adapter(folder / name, base=folder / "base", seed=seed)
        sources[name] = folder / name
    loaded = {
        key: GenARM.from_pretrained(
            folder / "base", [sources[name] for name in names], dtype=torch.float32, draft_model=build_model("llama", 4)
        )
        for key, names in ARMS.items()
    }
    assert loaded["lane"].arms[0].shared is loaded["lane"].base.shared
    assert loaded["own"].arms[0].shared is not loaded["own"].base.shared
    return loaded


@dataclass
class Run:
    arms: str
    rows: int
    requests: list[dict[str, Any]]
    speculation: str | Speculation
    chunk: int  # tokens of a prefill chunk
    changes: dict[int, list[float]] | None  # weights set after that many chunks of a stream; None: no stream


@st.composite
def runs(draw: st.DrawFn) -> Run:
    arms = draw(st.sampled_from(list(ARMS)))
    requests = draw(st.lists(REQUEST, min_size=1, max_size=5))
    changes = draw(st.none() | st.dictionaries(st.integers(0, 12), st.tuples(*[WEIGHTS] * len(ARMS[arms])), max_size=3))
    common = draw(st.sampled_from([0, 0, 12]))  # length of a common beginning that is prefilled once
    for i, request in enumerate(requests):
        request["prompt"] = [*range(20, 20 + common), *request["prompt"]]
        request["weights"] = [draw(WEIGHTS) for _ in ARMS[arms]]
        request["seed"] = draw(st.integers(0, 2**64 - 1)) + i & 2**64 - 1
        if changes is not None:
            request["n"] = 1
    drafters = ["ngram", "draft_model", *(["base", "arm"] if "own" in ARMS[arms] else [])]
    speculation = st.just("off") | st.builds(Speculation, st.sampled_from(drafters), st.integers(1, 6))
    chunk = draw(st.sampled_from([scheduler.CHUNK_TOKENS, 5]))
    return Run(arms, draw(st.integers(1, 4)), requests, draw(speculation), chunk, changes)


def outputs_of(model: GenARM, run: Run) -> list[GenerationOutput]:
    prompts = [request["prompt"] for request in run.requests]
    params = [
        SamplingParams(**{name: value for name, value in request.items() if name != "prompt"})
        for request in run.requests
    ]
    if run.changes is None:
        return model.generate(prompts, params, speculation=run.speculation)
    with model.stream(prompts, params, speculation=run.speculation) as stream:
        for i, _ in enumerate(stream):
            if i in run.changes:
                stream.set_weights(run.changes[i])
    return stream.outputs


def check(models: dict[str, GenARM], run: Run) -> None:
    model = models[run.arms]
    model.max_batch_size = run.rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "CHUNK_TOKENS", run.chunk)
        outputs = outputs_of(model, run)
    for request, output in zip(run.requests, outputs):
        assert output.prompt_token_ids == request["prompt"]
        assert len(output.completions) == request["n"]
        assert output.completions[0].seed == request["seed"]
        known = {k: v for k, v in request.items() if k not in ("prompt", "n", "seed", "logprobs", "rewards")}
        if run.changes is not None:
            used = output.completions[0].weights
            known["weights"] = lambda i, used=used: used[min(i, len(used) - 1)]
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
    """This is the negative control."""
    with pytest.raises(AssertionError):
        fuzz(models, 25, phases=[Phase.generate])
