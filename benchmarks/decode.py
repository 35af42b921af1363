"""Tokens per second of guided decoding on a CPU: what LoRA ARMs cost as lanes, as forwards of their own, and naively.

    OMP_NUM_THREADS=1 python benchmarks/decode.py BASE ARM ARM [--tokens 32] [--rounds 3] [--json]

Variants take turns in one process, after one unmeasured round of all; medians are shown. The clock is the process's
CPU time: with one thread that is the time on an idle machine, and other processes on a shared one do not count.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from genarm_fast import GenARM

TEXT = "Write a short review of the film that you saw last night, and say whether you would see it again."
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@torch.inference_mode()
def naive(models: list[Any], weights: list[float], prompts: Tensor, tokens: int) -> None:
    """Every model in turn with a cache of its own, then log-softmax, sum, softmax, multinomial."""
    caches = [DynamicCache(config=model.config) for model in models]
    step = prompts
    for _ in range(tokens):
        scores: Any = 0
        for model, weight, cache in zip(models, weights, caches):
            logits = model(input_ids=step, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            scores = scores + weight * logits.float().log_softmax(-1)
        step = scores.softmax(-1).multinomial(1)


def variants(base: str, arms: list[str], dtype: torch.dtype, batch: int, tokens: int) -> dict[str, Callable[[], Any]]:
    lanes = GenARM.from_pretrained(base, arms, dtype=dtype)
    separate = GenARM.from_pretrained(lanes.base.model, arms, tokenizer=lanes.tokenizer)
    for member in separate.members:
        member.shared = member.model
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), arms[0])
    two_models = [bare, adapted.merge_and_unload().eval()]
    ids = lanes.tokenizer(TEXT)["input_ids"]
    rows = [[first, *ids] for first in range(100, 100 + batch)]  # all different: the engine prefills equal prompts once
    prompts = torch.tensor(rows)

    def ours(model: GenARM, *weights: float) -> Callable[[], Any]:
        seeds = iter(range(10**9))

        def run() -> None:
            params = {"max_new_tokens": tokens, "ignore_eos": True, "seed": next(seeds)}
            model.generate(rows, weights=[*weights, *[0.0] * (len(arms) - len(weights))], **params)

        return run

    limits = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    return {
        "base alone": ours(lanes),
        "base alone, Hugging Face generate": lambda: bare.generate(
            prompts, attention_mask=torch.ones_like(prompts), **limits
        ),
        "1 LoRA ARM, lanes": ours(lanes, 1.0),
        "2 LoRA ARMs, lanes": ours(lanes, 1.0, 0.5),
        "1 LoRA ARM, own forward": ours(separate, 1.0),
        "2 LoRA ARMs, own forwards": ours(separate, 1.0, 0.5),
        "1 ARM, naive loop over two models": lambda: naive(two_models, [1.0, 1.0], prompts, tokens),
    }


def measure(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if round_:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("arms", nargs=2, metavar="arm", help="folder of a LoRA adapter of the base")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens per prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    results = []
    for dtype in args.dtype:
        for batch in args.batch:
            found = measure(variants(args.base, args.arms, DTYPES[dtype], batch, args.tokens), args.rounds)
            for name, seconds in found.items():
                ratio = found["base alone"] / seconds
                tokens = batch * args.tokens / seconds
                results.append({"dtype": dtype, "batch": batch, "variant": name, "tokens/s": tokens, "ratio": ratio})
    about = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokens": args.tokens,
        "rounds": args.rounds,
    }
    if args.json:
        print(json.dumps({"about": about, "results": results}, indent=1))
        return
    table = Table(title="tokens/s (ratio to the base alone); " + ", ".join(f"{k} {v}" for k, v in about.items()))
    table.add_column("")
    shapes = list(dict.fromkeys((line["dtype"], line["batch"]) for line in results))
    for dtype, batch in shapes:
        table.add_column(f"{dtype}, batch {batch}", justify="right")
    for name in dict.fromkeys(line["variant"] for line in results):
        lines = [line for line in results if line["variant"] == name]
        table.add_row(name, *(f"{line['tokens/s']:.1f} ({line['ratio']:.2f})" for line in lines))
    Console().print(table)


if __name__ == "__main__":
    main()
