"""Compares guided_sample on the CPU with eager PyTorch.

    python benchmarks/kernels.py [--threads N] [--rounds N] [--cpu-time] [--decode] [--compile] [--json F] [--plot F]

Every case is first checked against the reference: a wrong kernel gets no figure. Each contender takes turns with
guided_sample. Times are medians. Speed-ups are medians of the ratios within a round, so that a busy machine disturbs
both sides alike. With --decode, a product with a 32 MB matrix and a write of the logits precede every call, as in a
decode loop.

    eager        weighted sum, softmax, cumsum, searchsorted: the fastest exact draw that PyTorch offers here
    multinomial  the same with torch.multinomial, like most samplers
    compiled     torch.compile of `eager` (with --compile: a minute of compiling)
    read         torch.sum over the same bytes: nothing that reads them can be faster

With top-p, `eager` and `multinomial` sort. With log-probs, they take each member's log_softmax and gather from it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genarm_fast.kernels import _native, guided_sample, guided_sample_reference, settle, settle_reference

TEMPERATURE, TOP_P = 0.8, 0.9
MODES: dict[str, dict[str, Any]] = {"draw": {}, "log-probs": {"return_logprobs": True}, "top-p": {"top_p": TOP_P}}


@dataclass
class Result:
    vocab: int
    arms: int
    dtype: str
    rows: int
    mode: str
    microseconds: dict[str, float]  # contender → median
    speedup: dict[str, float]  # contender → median of its time over that of guided_sample
    # The time of torch to read the same bytes, from caches equally warm, as a share of guided_sample's time.
    reading: float


def eager(members: Sequence[Tensor], weights: Sequence[float], mode: str, multinomial: bool = False) -> Tensor:
    """Return one token per row, [R, 1], drawn from the members' logits [R, V]."""
    scores = [logits.float() for logits in members]
    if mode == "log-probs":
        scores = [logits.log_softmax(-1) for logits in scores]
    combined = scores[0]
    for weight, arm in zip(weights, scores[1:]):
        combined = torch.add(combined, arm, alpha=weight)
    combined = combined / TEMPERATURE
    order = None
    if mode == "top-p":
        combined, order = combined.sort(-1, descending=True)
    probs = combined.softmax(-1)
    if mode == "top-p":
        mass = probs.cumsum(-1)
        probs = probs.masked_fill(mass - probs >= TOP_P, 0.0)
    if multinomial:
        tokens = probs.multinomial(1)
    else:
        mass = probs.cumsum(-1)
        tokens = torch.searchsorted(mass, torch.rand(len(mass), 1) * mass[:, -1:]).clamp_max(mass.shape[-1] - 1)
    if order is not None:
        return order.gather(-1, tokens)
    if mode == "log-probs":
        probs.gather(-1, tokens).log()
        for logprobs in scores:
            logprobs.gather(-1, tokens)
    return tokens


clock = time.perf_counter


def interleaved(
    contenders: dict[str, Callable[[], object]], rounds: int, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Return the microseconds of each contender in each round: one call per turn, after two rounds of warming up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 2):
        for name, contender in contenders.items():
            before()
            start = clock()
            contender()
            times[name].append((clock() - start) * 1e6)
    return {name: found[2:] for name, found in times.items()}


def overheads() -> dict[str, float]:
    """Return the median microseconds of calls that compute almost nothing, with arguments like those of the engine."""
    base, arm, count, one = torch.zeros(1, 16), torch.zeros(1, 16), torch.zeros(1, dtype=torch.int64), torch.ones(1)
    rest: dict[str, Any] = {"temperature": one, "top_k": count, "top_p": one, "min_p": 0 * one}
    rest |= {"seeds": count, "positions": count}
    targets = torch.arange(40).view(8, 5)
    rows: dict[str, Any] = {"lengths": targets[:, 0], "limits": targets[:, 4] + 9, "finished": targets[:, 0] < 0}
    rows |= {"stop_ids": torch.tensor([99]), "draft_counts": torch.full((8,), 4)}
    calls: dict[str, Callable[[], object]] = {
        "guided_sample": lambda: guided_sample(base, (arm,), one, **rest),
        "guided_sample, log-probs": lambda: guided_sample(base, (arm,), one, return_logprobs=True, **rest),
        "settle, 8 rows of 4 drafts": lambda: settle(targets, targets[:, :4], **rows),
        "settle, PyTorch": lambda: settle_reference(targets, targets[:, :4], **rows),
    }
    return {name: statistics.median(found) for name, found in interleaved(calls, 2000).items()}


def measure(vocab: int, arms: int, dtype: torch.dtype, rows: int, mode: str, options: argparse.Namespace) -> Result:
    generator = torch.Generator().manual_seed(0)
    members = [(3 * torch.randn(rows, vocab, generator=generator)).to(dtype) for _ in range(arms + 1)]
    weights = [1.0 / arms] * arms
    arguments: dict[str, Any] = {"temperature": TEMPERATURE, "seeds": 1, "positions": torch.arange(rows)}
    arguments |= MODES[mode]

    def ours() -> object:
        return guided_sample(members[0], members[1:], weights, **arguments)

    expected = guided_sample_reference(members[0], members[1:], weights, **arguments)
    if not torch.equal(guided_sample(members[0], members[1:], weights, **arguments).tokens, expected.tokens):
        raise SystemExit(f"wrong tokens at V={vocab}, {arms} ARMs, {dtype}, {rows} rows, {mode}: nothing is timed")

    contenders = {
        "read": lambda: [logits.view(torch.float32).sum() for logits in members],
        "eager": lambda: eager(members, weights, mode),
        "multinomial": lambda: eager(members, weights, mode, multinomial=True),
    }
    if options.compile and mode != "top-p":
        torch.compiler.reset()  # every shape gets its own code, and the limit on recompilations is not reached
        compiled = torch.compile(eager, dynamic=False)
        contenders["compiled"] = lambda: compiled(members, weights, mode)
    source, layer, activation = [logits.clone() for logits in members], torch.ones(2048, 4096), torch.ones(4096)

    def decode() -> None:
        layer.mv(activation)
        for logits, copy in zip(members, source):
            logits.copy_(copy)

    rounds = max(3, options.rounds // rows) if mode == "top-p" else options.rounds
    before = decode if options.decode else lambda: None
    pairs = {
        name: interleaved({"ours": ours, name: contender}, rounds, before) for name, contender in contenders.items()
    }
    ratios = {
        name: statistics.median(other / own for other, own in zip(times[name], times["ours"]))
        for name, times in pairs.items()
    }
    reading = ratios.pop("read")
    median = {name: statistics.median(times[name]) for name, times in pairs.items()}
    median["ours"] = statistics.median(pairs["eager"]["ours"])
    return Result(vocab, arms, str(dtype)[6:], rows, mode, median, ratios, reading)


def table(results: list[Result]) -> str:
    """Return a Markdown table with a row for each shape.

    A mode's column has the time of guided_sample, the share of it that mere reading takes, and the speed-ups."""
    names = list(results[0].speedup)
    titles = ["V", "ARMs", "dtype", "rows", *(f"{mode}: µs, reading, vs {', '.join(names)}" for mode in MODES)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    shapes: dict[tuple, list[str]] = {}
    for r in results:
        speedups = ", ".join(f"{r.speedup[name]:.1f}x" for name in names if name in r.speedup)
        cell = f"{r.microseconds['ours']:.0f}, {r.reading:.0%}, {speedups}"
        shapes.setdefault((r.vocab, r.arms, r.dtype, r.rows), []).append(cell)
    lines += [f"| {' | '.join(map(str, (*shape, *cells)))} |" for shape, cells in shapes.items()]
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(MODES), figsize=(12, 4.5), sharey=True, layout="constrained")
    for axis, mode in zip(axes, MODES):
        chosen = [result for result in results if result.mode == mode]
        labels = [
            f"{r.vocab // 1000}k, {r.arms} ARM{'s' * (r.arms > 1)}, {r.dtype}, {r.rows} row{'s' * (r.rows > 1)}"
            for r in chosen
        ]
        axis.barh(labels, [r.speedup["eager"] for r in chosen], color="#4878a8")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=mode, xlabel="speed-up over eager PyTorch", xscale="log", xlim=(0.9, 60))
        axis.set_xticks([1, 2, 5, 10, 20, 50], ["1x", "2x", "5x", "10x", "20x", "50x"], minor=False)
        axis.minorticks_off()
        axis.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch and of the core (default: 1)")
    parser.add_argument("--rounds", type=int, default=15, help="per case (default: 15)")
    parser.add_argument("--cpu-time", action="store_true", help="count this thread's time only: for a busy machine")
    parser.add_argument("--decode", action="store_true", help="with the caches as a decode loop leaves them")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--plot", type=Path, help="draw the speed-ups over eager there (PNG)")
    options = parser.parse_args()
    if _native.core is None:
        raise SystemExit("the C++ core is not built: pip install -e . with a compiler, and GENARM_FAST_ISA not none")
    torch.set_num_threads(options.threads)
    if options.cpu_time:
        if options.threads > 1:
            parser.error("--cpu-time counts one thread: it needs --threads 1")
        global clock
        clock = time.thread_time
    calls = overheads()
    results = [
        measure(vocab, arms, dtype, rows, mode, options)
        for mode, vocab, arms, dtype, rows in product(
            MODES, (32000, 128256), (1, 3), (torch.float32, torch.bfloat16), (1, 32)
        )
    ]
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instruction set": _native.instruction_set(),
        "torch": torch.__version__,
        "threads": options.threads,
        "clock": "CPU time" if options.cpu_time else "wall",
    }
    print(", ".join(f"{name}: {value}" for name, value in machine.items()), end="\n\n")
    print("µs a call:", ", ".join(f"{name} {value:.1f}" for name, value in calls.items()), end="\n\n")
    print(table(results))
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine, "calls": calls, "results": [asdict(r) for r in results]}, indent=1)
        )
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
