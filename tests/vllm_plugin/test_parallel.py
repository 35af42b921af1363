"""Tensor parallelism over two processes: slices of the lanes' A and B, and logits gathered for each member."""

from __future__ import annotations

from engines import PROMPTS, asking, engine, generated, loaded, naive

WEIGHTS = [[1.0, 1.0], [0.7, -0.3], [2.5, 0.5], [0.0, 1.0]]
TOKENS = 4


def test_two_ranks_give_the_tokens_of_one(models, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engine(models, ["lora1", "small"], tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        found = generated(llm, PROMPTS, [asking(each, max_tokens=TOKENS) for each in WEIGHTS])
    members = [loaded(models, name) for name in ("base", "lora1", "small")]
    for prompt, each, tokens in zip(PROMPTS, WEIGHTS, found):
        assert tokens == naive(members, prompt, each, TOKENS)
    assert found[2] != naive(members, PROMPTS[2], WEIGHTS[2][::-1], TOKENS)
