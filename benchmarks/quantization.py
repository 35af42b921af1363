"""Compares a model in bfloat16 with its quantization "exact", "int8" and "int4": the loss, and the time of a step.

    python benchmarks/quantization.py [MODEL] [--text FILE] [--tokens N] [--windows N] [--rows N ...] [--steps N]
        [--ways WAY ...]

The defaults are the demo's base and this repository's docs/design.md. KL and perplexity are means over the tokens of
windows of the text, by transformers' own forward. KL is taken from the checkpoint in float32 arithmetic to each way, so
the line of bfloat16 shows the cost of its rounding. Greedy texts continue prompts that are cut from the text. A step's
time is the median CPU time of decoding, in turns, with one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from genarm_fast import GenARM, SamplingParams, demo

WAYS = ("exact", "int8", "int4")


@torch.inference_mode()
def log_probs(model: GenARM, windows: Tensor) -> Tensor:
    """Return the base's log-probs of the windows' tokens, float32 [windows, tokens, V]."""
    return torch.cat([model.base.model(input_ids=row[None]).logits.float().log_softmax(-1) for row in windows])


def decode(model: GenARM, prompts: list[list[int]], steps: int) -> tuple[float, list[list[int]]]:
    """Return the CPU milliseconds of a step, and the greedy tokens. The prompts' time is measured and subtracted."""
    params = [SamplingParams(max_new_tokens=n, temperature=0.0, ignore_eos=True) for n in (1, steps + 1)]
    times, outputs = [], []
    for each in params:
        start = time.process_time()
        outputs = model.generate(prompts, each, speculation="off")
        times.append(time.process_time() - start)
    return (times[1] - times[0]) * 1e3 / steps, [output.completions[0].token_ids for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or hub id (default: the demo's base)")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "docs" / "design.md")
    parser.add_argument("--tokens", type=int, default=256, help="of a window (default: 256)")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="decoded together")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="beside bfloat16 (default: all)")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = options.model or demo.base()
    models, loaded = {}, {}
    ways = (None, *options.ways)
    for way in ways:
        start = time.process_time()
        models[way] = GenARM.from_pretrained(source, dtype=torch.bfloat16, device="cpu", quantization=way)
        loaded[way] = time.process_time() - start
    ids = models[None].tokenizer(options.text.read_text(), return_tensors="pt").input_ids[0]
    windows = ids[: options.windows * options.tokens].view(-1, options.tokens)
    precise = GenARM.from_pretrained(source, dtype=torch.float32, device="cpu")
    wanted = log_probs(precise, windows)
    del precise
    next_tokens = windows[:, 1:, None]

    steps: dict[str | None, dict[int, list[float]]] = {way: {rows: [] for rows in options.rows} for way in ways}
    texts: dict[str | None, list[list[int]]] = {}
    for _ in range(options.turns):
        for rows in options.rows:
            prompts = [row[:24].tolist() for row in windows[torch.arange(rows) % len(windows)]]
            for way, model in models.items():
                took, texts[way] = decode(model, prompts, options.steps)
                steps[way][rows].append(took)
    measured = "KL from float32: mean, largest | same top token | perplexity | greedy texts equal"
    print(f"| weights | MB | load, s CPU | {measured} |", end="")
    print("".join(f" {rows} rows, ms a step |" for rows in options.rows))
    print("|---" * (7 + len(options.rows)) + "|")
    for way, model in models.items():
        found = log_probs(model, windows)
        kl = (wanted.exp() * (wanted - found)).sum(-1)
        same = (wanted.argmax(-1) == found.argmax(-1)).float().mean()
        perplexity = -found[:, :-1].gather(-1, next_tokens).mean()
        report = model.quantized["base"]
        size = sum(p.nbytes for p in {id(p): p for p in model.base.model.parameters()}.values()) / 1e6
        equal = sum(map(list.__eq__, texts[way], texts[None]))
        cells = [
            "bfloat16" if report is None else report.how,
            f"{size:.0f}",
            f"{loaded[way]:.1f}",
            f"{kl.mean():.1e}, {kl.max():.1e}",
            f"{same:.1%}",
            f"{perplexity.exp():.3f}",
            f"{equal} of {len(texts[way])}",
            *(f"{statistics.median(steps[way][rows]):.1f}" for rows in options.rows),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
