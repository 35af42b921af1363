"""Runs thousands of random requests through tiny models, and checks that memory stays flat and tokens are right.

    OMP_NUM_THREADS=1 python benchmarks/soak.py [--requests 10000] [--seconds 360] [--seed 0] [--json FILE]

The models are a base, a LoRA ARM in the base's forward, and an ARM with a forward of its own. They decode groups of
requests, each group with another drafter. Resident memory is read between groups; its slope leaves out the first
quarter. Some requests of every group are decoded again, alone and without drafts, and their tokens are compared.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from genarm_fast import ARM, GenARM, SamplingParams
from genarm_fast.outputs import GenerationOutput
from genarm_fast.speculation.config import Speculation

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_models import build_model, build_tokenizer, save_adapter

GROUP = 50  # requests of one call
COMPARED = 2  # requests of a group that are decoded again
DRAFTERS: list[str | Speculation] = [
    "auto",
    Speculation("own", 3),
    Speculation("ngram", 4),
    "off",
    Speculation("base", 2),
]


def tiny_model(folder: Path, batch_size: int) -> GenARM:
    base = folder / "base"
    build_model("llama", 0).save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    save_adapter(folder / "lane", base=base, seed=1)
    arms = [ARM(folder / "lane", name="lane"), ARM(build_model("llama", 2, num_hidden_layers=1), name="own")]
    return GenARM.from_pretrained(base, arms, dtype=torch.float32, max_batch_size=batch_size)


def random_request(rng: random.Random) -> tuple[list[int], SamplingParams]:
    """Return a random prompt and random parameters. Some prompts share a beginning; many parameters keep a default."""

    def maybe(value: Any, default: Any) -> Any:
        return value if rng.random() < 0.3 else default

    start = list(range(10, 30)) if rng.random() < 0.2 else []
    prompt = start + [rng.randrange(2, 300) for _ in range(rng.choice([1, 3, 10, 40]))]
    params = SamplingParams(
        weights=[rng.choice([0.0, 0.5, 1.0, -0.7]) for _ in range(2)],
        temperature=rng.choice([0.0, 0.5, 1.0]),
        top_k=maybe(rng.randint(1, 40), 0),
        top_p=maybe(rng.uniform(0.3, 1.0), 1.0),
        min_p=maybe(rng.uniform(0.0, 0.3), 0.0),
        max_new_tokens=rng.choice([1, 2, 5, 8, 16]),
        stop_token_ids=maybe([rng.randrange(2, 300) for _ in range(20)], ()),
        ignore_eos=maybe(True, False),
        repetition_penalty=1.3 if rng.random() < 0.1 else 1.0,
        logprobs=maybe(2, None),
        rewards=maybe(True, False),
        n=maybe(2, 1),
        seed=rng.getrandbits(64),
    )
    return prompt, params


def soak(
    requests: int,
    *,
    seed: int = 0,
    seconds: float = float("inf"),
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Run `requests` requests, but begin none after `seconds` seconds, and return the figures of the run."""
    rng = random.Random(seed)
    memory: list[tuple[int, int]] = []  # (requests done, resident bytes)
    compared = different = completions = tokens = done = 0
    start, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder), batch_size)
        for drafter in cycle(DRAFTERS):
            if done >= requests or time.monotonic() - start > seconds:
                break
            group = [random_request(rng) for _ in range(min(GROUP, requests - done))]
            prompts, params = [prompt for prompt, _ in group], [each for _, each in group]
            outputs = model.generate(prompts, params, speculation=drafter)
            for i in rng.sample(range(len(group)), min(COMPARED, len(group))):
                alone = model.generate(prompts[i], params[i], speculation="off")[0]
                compared += 1
                different += tokens_of(alone) != tokens_of(outputs[i])
            found = [tokens_of(output) for output in outputs]
            completions += sum(map(len, found))
            tokens += sum(len(line) for lines in found for line in lines)
            done += len(group)
            advance(len(group))
            del outputs, found, alone
            gc.collect()
            memory.append((done, resident_bytes()))
    steady = memory[len(memory) // 4 :]
    return {
        "requests": done,
        "completions": completions,
        "tokens": tokens,
        "compared": compared,
        "different": different,
        "resident MiB after the first group": memory[0][1] / 2**20,
        "resident MiB after a quarter": steady[0][1] / 2**20,
        "resident MiB at the end": memory[-1][1] / 2**20,
        "slope, KiB per 1000 requests": 1000 * slope(steady) / 2**10,
        "seconds": time.monotonic() - start,
        "CPU seconds": time.process_time() - cpu,
    }


def tokens_of(output: GenerationOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.completions]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(points: list[tuple[int, int]]) -> float:
    """Return the slope of the least-squares line through the points."""
    x, y = torch.tensor(points, dtype=torch.float64).unbind(1)
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum().clamp_min(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no group after so long")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    columns = (TextColumn("soak"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("soak", total=args.requests)
        options = {"seed": args.seed, "seconds": args.seconds, "batch_size": args.batch_size}
        result = soak(args.requests, advance=lambda count: bar.advance(task, count), **options)
    result |= {
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    Console().print(result)
    sys.exit(result["different"] > 0)


if __name__ == "__main__":
    main()
