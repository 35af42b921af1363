"""Two processes: tensor parallel with slices of lanes, and pipeline parallel with some layers of each member."""

from __future__ import annotations

import pytest
from engines import PROMPTS, asking, engine, generated, loaded, naive

WEIGHTS = [[1.0, 1.0], [0.7, -0.3], [2.5, 0.5], [0.0, 1.0]]
TOKENS = 4


@pytest.mark.parametrize(
    ("kind", "arms"), [("tensor_parallel_size", ["lora1", "small"]), ("pipeline_parallel_size", ["qwen", "small"])]
)
def test_two_ranks_give_the_tokens_of_one(kind, arms, models, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engine(models, arms, distributed_executor_backend="mp", **{kind: 2}) as llm:
        assert getattr(llm.llm_engine.vllm_config.parallel_config, kind) == 2
        found = generated(llm, PROMPTS, [asking(each, max_tokens=TOKENS) for each in WEIGHTS])
    members = [loaded(models, name) for name in ("base", *arms)]
    for prompt, each, tokens in zip(PROMPTS, WEIGHTS, found):
        assert tokens == naive(members, prompt, each, TOKENS)
    assert found[2] != naive(members, PROMPTS[2], WEIGHTS[2][::-1], TOKENS)
