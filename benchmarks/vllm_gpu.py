"""Checks guided decoding inside vLLM where only a GPU can: CUDA graphs, bfloat16, an FP8 base, the Triton sampler.

    python benchmarks/vllm_gpu.py                       # with vLLM's CUDA build; ten minutes or so
    PYTHONPATH=tests/vllm_plugin/site VLLM_ENABLE_V1_MULTIPROCESSING=0 .venv-vllm/bin/python benchmarks/vllm_gpu.py \
        --cases eager                                   # tries the script out on a CPU

The base is SmolLM2-135M, with a small ARM and two LoRA lanes. Each case is an engine in a process of its own. The
script checks two things:

- the law: guided log-probabilities of a text, over the whole vocabulary, are those of the members, combined in float64.
  The same engine gives the members' log-probabilities: the base's at weights of 0, an ARM's by `arm_reward`.
- seeds, in float32: the tokens are those of `GenARM.generate` for the same requests.

The exit status is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

import torch

from genarm_fast import ARM, GenARM, SamplingParams, demo
from genarm_fast.integrations.vllm import engine_args

ARMS = ["small", "positive", "concise"]
WEIGHTS = [0.7, -0.4, 1.2]
CASES: dict[str, tuple[dict[str, Any], float]] = {  # name -> (options of vLLM, largest error of a log-probability)
    "eager": ({"dtype": "float32", "enforce_eager": True}, 1e-3),
    "graphs": ({"dtype": "float32"}, 1e-3),
    "bfloat16": ({"dtype": "bfloat16"}, 0.1),
    "fp8": ({"dtype": "bfloat16", "quantization": "fp8"}, 0.1),
}
SETTINGS = {"max_model_len": 128, "max_num_seqs": 16, "max_logprobs": -1, "kv_cache_memory_bytes": 1 << 30}
TEXT = "The quick brown fox jumps"
PROMPTS = ["The weather today", "My favourite book is", "To bake bread,", "Once upon a time"]
TOKENS = 24


def law(llm: Any, ids: list[int]) -> float:
    """Return the largest error of a guided log-probability of a text."""
    from vllm import SamplingParams as Asked

    asked = [{"arm_weights": WEIGHTS}, {"arm_weights": 0.0}, *({"arm_reward": name} for name in ARMS)]
    params = [Asked(max_tokens=1, temperature=0, prompt_logprobs=-1, extra_args=each) for each in asked]
    outputs = llm.generate([{"prompt_token_ids": ids}] * len(asked), params, use_tqdm=False)
    rows = [[[row[i].logprob for i in range(len(row))] for row in out.prompt_logprobs[1:]] for out in outputs]
    guided, base, *arms = torch.tensor(rows, dtype=torch.float64)
    expected = (base + sum(w * arm for w, arm in zip(WEIGHTS, arms))).log_softmax(-1)
    return float((guided - expected).abs().max())


def equal_tokens(llm: Any, specs: list[ARM]) -> float:
    """Return the share of tokens equal to those of `GenARM.generate` for the same seeds. The first text is greedy."""
    from vllm import SamplingParams as Asked

    model = GenARM.from_pretrained(demo.base(), specs, dtype="float32", speculation="off")
    kinds = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}, {"top_k": 40}]
    here = [SamplingParams(weights=WEIGHTS, seed=i, max_new_tokens=TOKENS, ignore_eos=True, **k)
            for i, k in enumerate(kinds)]  # fmt: skip
    there = [Asked(seed=i, max_tokens=TOKENS, ignore_eos=True, extra_args={"arm_weights": WEIGHTS}, **k)
             for i, k in enumerate(kinds)]  # fmt: skip
    prompts = [model.tokenizer(text).input_ids for text in PROMPTS]
    ours = [list(output.token_ids) for output in model.generate(prompts, here)]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], there, use_tqdm=False)
    theirs = [list(output.outputs[0].token_ids) for output in outputs]
    return sum(a == b for x, y in zip(ours, theirs) for a, b in zip(x, y)) / (len(kinds) * TOKENS)


def check(case: str) -> bool:
    from vllm import LLM

    options, allowed = CASES[case]
    specs = [ARM(demo.arm(name), name=name) for name in ARMS]
    llm = LLM(**engine_args(demo.base(), specs, **SETTINGS, **options))
    off = law(llm, llm.get_tokenizer()(TEXT).input_ids)
    line, right = f"{case}: log-probabilities off by {off:.2g}, allowed {allowed:g}", off <= allowed
    if options["dtype"] == "float32":
        share = equal_tokens(llm, specs)
        line, right = f"{line}; {share:.1%} of the tokens are GenARM's", right and share == 1.0
    print(line if right else f"{line}: WRONG", flush=True)
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return 0 if check(args.one) else 1
    return max(subprocess.run([sys.executable, __file__, "--one", case]).returncode for case in args.cases)


if __name__ == "__main__":
    sys.exit(main())
