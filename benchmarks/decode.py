"""Measures guided decoding on a CPU in tokens/s: LoRA ARMs as lanes, with forwards of their own, and in a naive loop.

    OMP_NUM_THREADS=1 python benchmarks/decode.py BASE ARM ARM [--tokens 32] [--rounds 3] [--compiled] [--json]
    OMP_NUM_THREADS=1 python benchmarks/decode.py BASE ARM ARM --memory | --growth
    OMP_NUM_THREADS=1 python benchmarks/decode.py BASE --random 1.3 --dtype bf16

The last form measures a random Llama with 1.3 billion weights and the tokenizer of BASE, with two random LoRA ARMs.
Variants take turns in one process, after one unmeasured round of all. Figures are medians, and no variant drafts. The
clock is the process's CPU time: with one thread this is the time on an idle machine, since other processes do not
count. GB/s are bytes of the base's weights, before any quantization, per second of a decode step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from result_files import machine, peak_resident
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, StaticCache

from genarm_fast import GenARM
from genarm_fast.bench.timing import take_turns

TEXT = "Write a short review of the film that you saw last night, and say whether you would see it again."
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HUGGING_FACE = "base alone, Hugging Face generate"


@torch.inference_mode()
def naive(models: list[Any], weights: list[float], prompts: Tensor, tokens: int) -> None:
    """Decode with every model in turn, each with a cache of its own, then log-softmax, sum, softmax, multinomial."""
    caches = [DynamicCache(config=model.config) for model in models]
    step = prompts
    for _ in range(tokens):
        scores: Any = 0
        for model, weight, cache in zip(models, weights, caches):
            logits = model(input_ids=step, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            scores = scores + weight * logits.float().log_softmax(-1)
        step = scores.softmax(-1).multinomial(1)


@torch.inference_mode()
def compiled(models: list[Any], weights: list[float], prompts: Tensor, tokens: int) -> None:
    """Decode like `naive`, but over static caches and with each decode step compiled."""
    rows, length = prompts.shape
    caches = [StaticCache(config=model.config, max_cache_len=length + tokens) for model in models]
    step, position = prompts, torch.arange(length)
    for _ in range(tokens):
        scores: Any = 0
        for model, weight, cache in zip(models, weights, caches):
            run = model.decode if step.shape[1] == 1 else model
            where = position.expand(rows, -1)
            logits = run(input_ids=step, position_ids=where, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            scores = scores + weight * logits.float().log_softmax(-1)
        step, position = scores.softmax(-1).multinomial(1), position[-1:] + 1


def variants(
    base: str,
    arms: list[str],
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    *,
    compile_too: bool,
    quantization: str | None = None,
) -> tuple[dict[str, Callable[[], Any]], int]:
    """Return the variants by name, and the bytes of the base's weights. quantization: applies to the lanes only."""
    lanes = GenARM.from_pretrained(base, arms, dtype=dtype, speculation="off", quantization=quantization)
    bare = lanes.base.model  # unchanged by the engine, which runs modules of its own over these weights
    if quantization:
        bare = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=False).eval()
    separate = GenARM.from_pretrained(bare, arms, tokenizer=lanes.tokenizer, speculation="off")
    for member in separate.members:
        member.shared = member.model
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=False), arms[0]
    )
    # Without requires_grad_, PyTorch would copy the merged model's head in a prefill.
    merged = adapted.merge_and_unload().eval().requires_grad_()
    two_models = [bare, merged]
    ids = lanes.tokenizer(TEXT)["input_ids"]
    rows = [[first, *ids] for first in range(100, 100 + batch)]  # all differ, since the engine prefills equal ones once
    prompts = torch.tensor(rows)

    def ours(model: GenARM, *weights: float) -> Callable[[], Any]:
        seeds = iter(range(10**9))

        def run() -> None:
            params = {"max_new_tokens": tokens, "ignore_eos": True, "seed": next(seeds)}
            model.generate(rows, weights=[*weights, *[0.0] * (len(arms) - len(weights))], **params)

        return run

    if compile_too:
        for model in two_models:
            model.decode = torch.compile(model.forward)
    limits = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    named = {"two models, compiled, static cache": lambda: compiled(two_models, [1.0, 1.0], prompts, tokens)}
    runs = {
        HUGGING_FACE: lambda: bare.generate(prompts, attention_mask=torch.ones_like(prompts), **limits),
        "base alone": ours(lanes),
        "1 LoRA ARM, lanes": ours(lanes, 1.0),
        "2 LoRA ARMs, lanes": ours(lanes, 1.0, 0.5),
        "1 LoRA ARM, own forward": ours(separate, 1.0),
        "2 LoRA ARMs, own forwards": ours(separate, 1.0, 0.5),
        "1 ARM, naive loop over two models": lambda: naive(two_models, [1.0, 1.0], prompts, tokens),
        **(named if compile_too else {}),
    }
    return runs, sum(parameter.nbytes for parameter in bare.parameters())


@contextmanager
def random_models(base: str, billions: float) -> Iterator[tuple[str, list[str]]]:
    """Yield the folder of a random Llama in the shape of TinyLlama-1.1B, and those of two adapters of rank 8.

    billions: the number of weights, reached by the number of layers."""
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    layer = 2048 * (2 * 2048 + 2 * 4 * 64 + 3 * 5632)
    layers = round((billions * 1e9 - 2048 * len(tokenizer)) / layer)
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=layers, tie_word_embeddings=True, **shape)
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        paths = [str(Path(folder, name)) for name in ("base", "arm", "arm2")]
        model.save_pretrained(paths[0])
        tokenizer.save_pretrained(paths[0])
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
        for path in paths[1:]:
            adapted.peft_config["default"].base_model_name_or_path = paths[0]
            adapted.save_pretrained(path)
        del model, adapted
        yield paths[0], paths[1:]


def measure(runs: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return each variant's median seconds."""
    turns = {name: lambda turn, run=run: run() for name, run in runs.items()}
    return {name: statistics.median(each) for name, each in take_turns(turns, rounds, clock).items()}


def peak_memory(base: str, arms: list[str], dtype: str, tokens: int) -> dict[str, float]:
    """Return the largest resident set, in bytes, of processes that decode with no ARM, one ARM and two ARMs."""
    code = "import sys; from decode import one_run; one_run(*sys.argv[1:])"
    found = {}
    for count in range(len(arms) + 1):
        command = [sys.executable, "-c", code, dtype, str(tokens), base, *arms[:count]]
        environment = os.environ | {"PYTHONPATH": sys.path[0]}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        found[f"{count} ARMs"] = float(output.split()[-1])
    return found


def one_run(dtype: str, tokens: str, base: str, *arms: str) -> None:
    model = GenARM.from_pretrained(base, arms, dtype=DTYPES[dtype], speculation="off")
    model.generate([TEXT] * 2, max_new_tokens=int(tokens), ignore_eos=True)
    print(peak_resident())


def growth(base: str, arm: str, dtype: str, tokens: int) -> dict[str, float]:
    """Return CPU milliseconds per token at several places of one long text, and for queues of 8 and 64 requests."""
    model = GenARM.from_pretrained(base, [arm], dtype=DTYPES[dtype], speculation="off")
    with model.stream(TEXT, max_new_tokens=tokens, ignore_eos=True, seed=1) as stream:
        stamps = [time.process_time() for _ in stream]
    steps = [1e3 * (after - before) for before, after in pairwise(stamps)]
    part, found = tokens // 8, {}
    for i in (0, 3, 7):
        found[f"tokens {i * part}..{(i + 1) * part}"] = statistics.median(steps[i * part : (i + 1) * part])
    for requests in (8, 64):
        prompts = [[i, *range(100, 120)] for i in range(requests)]
        start = time.process_time()
        model.generate(prompts, max_new_tokens=16, ignore_eos=True, seed=1)
        spent = 1e3 * (time.process_time() - start)
        found[f"{requests} requests, {model.max_batch_size} slots"] = spent / requests / 16
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("arms", nargs="*", metavar="arm", help="two folders of LoRA adapters of the base")
    parser.add_argument("--random", type=float, metavar="BILLIONS", help="a random Llama of so many weights instead")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens per prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--quantization", choices=["exact", "int8", "int4"], help="of our lanes, with --dtype bf16")
    parser.add_argument("--skip", nargs="+", default=[], metavar="VARIANT", help="leave these out")
    parser.add_argument("--compiled", action="store_true", help="also a compiled loop")
    parser.add_argument("--wall", action="store_true", help="wall-clock time, for several threads on an idle machine")
    parser.add_argument("--memory", action="store_true", help="only peak memory")
    parser.add_argument("--growth", action="store_true", help="only the cost per token in long texts and queues")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if len(args.arms) != (0 if args.random else 2):
        parser.error(f"{len(args.arms)} arms: expected two, or none with --random")
    if args.random:
        with random_models(args.base, args.random) as (args.base, args.arms):
            run(args)
    else:
        run(args)


def run(args: argparse.Namespace) -> None:
    if args.memory or args.growth:
        for dtype in args.dtype:
            measured = peak_memory if args.memory else growth
            found = measured(args.base, args.arms if args.memory else args.arms[0], dtype, args.tokens)
            first = next(iter(found.values()))
            if args.json:
                print(json.dumps({"dtype": dtype, **found}))
            else:
                unit = 2**20 if args.memory else 1
                print(dtype, {name: f"{value / unit:.4g} ({value / first:.2f})" for name, value in found.items()})
        return

    results = []
    for dtype in args.dtype:
        for batch in args.batch:
            options = {"compile_too": args.compiled, "quantization": args.quantization}
            runs, size = variants(args.base, args.arms, DTYPES[dtype], batch, args.tokens, **options)
            runs = {name: run for name, run in runs.items() if name not in args.skip}
            found = measure(runs, args.rounds, time.perf_counter if args.wall else time.process_time)
            for name, seconds in found.items():
                ratio = found[HUGGING_FACE] / seconds
                tokens = batch * args.tokens / seconds
                line = {"dtype": dtype, "batch": batch, "variant": name, "tokens/s": tokens, "ratio": ratio}
                results.append(line | {"GB/s": size * args.tokens / seconds / 1e9})
    about = machine() | {"tokens": args.tokens, "rounds": args.rounds, "quantization": args.quantization}
    if args.json:
        print(json.dumps({"about": about, "results": results}, indent=1))
        return
    table = Table(title=f"tokens/s (ratio to {HUGGING_FACE}; GB/s); " + ", ".join(f"{k} {v}" for k, v in about.items()))
    table.add_column("")
    shapes = list(dict.fromkeys((line["dtype"], line["batch"]) for line in results))
    for dtype, batch in shapes:
        table.add_column(f"{dtype}, batch {batch}", justify="right")
    for name in dict.fromkeys(line["variant"] for line in results):
        lines = [line for line in results if line["variant"] == name]
        table.add_row(name, *(f"{line['tokens/s']:.1f} ({line['ratio']:.2f}; {line['GB/s']:.1f})" for line in lines))
    Console().print(table)


if __name__ == "__main__":
    main()
