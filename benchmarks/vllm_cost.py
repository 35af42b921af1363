"""Measures the cost of guidance inside vLLM on a CPU: the base alone, with a small ARM, with one and two LoRA lanes.

    PYTHONPATH=tests/vllm_plugin/site VLLM_ENABLE_V1_MULTIPROCESSING=0 OMP_NUM_THREADS=1 \
        .venv-vllm/bin/python benchmarks/vllm_cost.py [--batches 1 8 32] [--tokens 24] [--json FILE]

The model is SmolLM2-135M in float32. vLLM's V2 runner interprets its kernels here, which adds time to every step.
genarm_fast's sampler draws for the base alone too: vLLM's would run in the interpreter and take seconds per step. Times
are the process's CPU time of decoding alone: the time of all tokens less that of one, the smallest of the rounds. The
bytes of weights and caches are counted, not measured.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from genarm_fast import ARM, demo
from genarm_fast.integrations.vllm import engine_args
from genarm_fast.integrations.vllm.plan import plan

CASES = {"base": [], "+ 1 small ARM": ["small"], "+ 1 lane": ["positive"], "+ 2 lanes": ["positive", "concise"]}
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 32,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 2 << 30,
    "distributed_executor_backend": "uni",
}


def draw_as_guided_ones_are() -> None:
    """Make engines of a base alone use genarm_fast's sampler."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    from genarm_fast.integrations.vllm.sampler import draw_by_our_contract

    DefaultModelState.custom_sampler = lambda self, sampler: (draw_by_our_contract(sampler), None)


def seconds(llm: Any, batch: int, tokens: int, rounds: int) -> float:
    """Return the CPU seconds of a step of `batch` requests."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": list(range(100 + i, 116 + i))} for i in range(batch)]

    def taken(count: int) -> float:
        began = time.process_time()
        llm.generate(
            prompts, SamplingParams(temperature=1.0, seed=1, max_tokens=count, ignore_eos=True), use_tqdm=False
        )
        return time.process_time() - began

    taken(2)
    return min(taken(tokens) - taken(1) for _ in range(rounds)) / (tokens - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from vllm import LLM

    draw_as_guided_ones_are()
    found: dict[str, Any] = {}
    for name, arms in CASES.items():
        specs = [ARM(demo.arm(arm), name=arm) for arm in arms]
        llm = LLM(**(engine_args(demo.base(), specs, **SETTINGS) if specs else {"model": str(demo.base()), **SETTINGS}))
        taken = {batch: seconds(llm, batch, args.tokens, args.rounds) for batch in args.batches}
        llm.llm_engine.engine_core.shutdown()
        memory = plan(demo.base(), specs, cache_bytes=4)
        found[name] = {
            "tokens per CPU second": {batch: round(batch / each, 2) for batch, each in taken.items()},
            "weights read a step, bytes of the files": memory.weights,
            "cache bytes a token": memory.cache_per_token,
        }
        print(name, f"{taken[args.batches[0]]:.3f} s a step,", json.dumps(found[name]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
