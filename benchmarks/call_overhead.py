"""Times what `genarm_fast.generate` adds to `GenARM.generate` once a model is loaded: a check whether anything changed.

    OMP_NUM_THREADS=1 python benchmarks/call_overhead.py [BASE ARM ...] [--tokens 16] [--rounds 31] [--json]

Without a BASE, the demo's base and its ARM `small` are used. Both functions take turns in one process, on models given
as folders and as loaded objects. The clock is CPU time. The table has medians of both, and of the differences within a
round. The check ("look") is also timed alone, since the time of a call varies by more than the check takes.
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
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import genarm_fast
from genarm_fast import GenARM, demo, functional
from genarm_fast.bench.timing import take_turns

PROMPT = "How was the film?"


def measure(base: Any, arms: list[Any], options: dict[str, Any], tokens: int, rounds: int) -> dict[str, float]:
    """Return medians in milliseconds, and `share`: the check's time over the time of `GenARM.generate`."""
    model = GenARM.from_pretrained(base, arms, **options)
    params = {"max_new_tokens": tokens, "ignore_eos": True, "seed": 1, "speculation": "off"}
    runs: dict[str, Callable[[int], Any]] = {
        "method": lambda turn: model.generate(PROMPT, **params),
        "function": lambda turn: genarm_fast.generate(base, arms, PROMPT, **options, **params),
        "look": lambda turn: functional._prepare(base, arms, PROMPT, None, options | params),
    }
    seconds = take_turns(runs, rounds, time.process_time)
    differences = [ours - plain for ours, plain in zip(seconds["function"], seconds["method"])]
    found = {name: 1e3 * statistics.median(each) for name, each in (seconds | {"difference": differences}).items()}
    return found | {"share": found["look"] / found["method"]}


def loaded(sources: list[Any]) -> list[Any]:
    return [AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False).eval() for source in sources]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", help="a model's folder")
    parser.add_argument("arms", nargs="*", metavar="arm", help="folders of ARMs")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16], help="new tokens of a call")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    base, arms = args.base or str(demo.base()), args.arms if args.base else [str(demo.arm("small"))]
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    given, *given_arms = loaded([base, *arms])
    kinds = {"folders": (base, arms, {}), "loaded models": (given, given_arms, {"tokenizer": tokenizer})}
    results = [
        {"models": kind, "tokens": tokens, **measure(*kinds[kind], tokens, args.rounds)}
        for kind in kinds
        for tokens in args.tokens
    ]
    about = {
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rounds": args.rounds,
    }
    if args.json:
        print(json.dumps({"about": about, "results": results}, indent=1))
        return
    table = Table(title="CPU ms, medians; " + ", ".join(f"{name} {value}" for name, value in about.items()))
    for name in ("models", "tokens", "GenARM.generate", "genarm_fast.generate", "difference", "look alone", "share"):
        table.add_column(name, justify="left" if name == "models" else "right")
    for line in results:
        times = (f"{line[name]:.3f}" for name in ("method", "function", "difference", "look"))
        table.add_row(line["models"], str(line["tokens"]), *times, f"{line['share']:.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
