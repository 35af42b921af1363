"""small_linear on the CPU against torch's bfloat16 linear and the speed of memory, interleaved.

    python benchmarks/linear.py [--threads N] [--cpu-time] [--models NAME ...] [--rows N ...] [--json FILE]

Weights are cold, as in a decode step: every call takes the next of as many copies as fill 512 MB. Each case is checked
against float64 first. A turn is one call of each contender and one read of as many bytes with torch.dot; figures are
medians over the turns, speed-ups and shares of the read bandwidth medians of the turns' own ratios, so that a busy
machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from genarm_fast.kernels import Lora, SmallLinear, _native

MODELS = {
    "smollm2-135m": [(576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576)],
    "2048-wide": [(2048, 2048), (8192, 2048), (2048, 8192), (128256, 2048)],
}
COLD = 512 << 20  # bytes of weights, more than caches hold


@dataclass
class Result:
    out_features: int
    in_features: int
    rows: int
    microseconds: float
    gigabytes: float  # per second, of weights
    of_read: float  # share of the read bandwidth
    speedup: float  # over torch


clock = time.perf_counter


def timed(call: Callable[..., object], *arguments: Tensor) -> float:
    start = clock()
    call(*arguments)
    return (clock() - start) * 1e6


def measure(linears: list[SmallLinear], block: Tensor, rows: int, seconds: float) -> Result:
    weight = linears[0].weight
    x = torch.randn(rows, weight.shape[1]).to(torch.bfloat16)
    exact = x.double() @ weight[:512].double().T
    torch.testing.assert_close(linears[0](x)[:, :512].double(), exact, rtol=2**-8, atol=1e-4)

    half = min(weight.nbytes, COLD) // 8
    ours, theirs, read = [], [], []
    end = clock() + seconds
    while len(ours) < 7 or (clock() < end and len(ours) < 300):
        turn = len(ours)
        first, second = linears[2 * turn % len(linears)], linears[(2 * turn + 1) % len(linears)]
        at = turn * 2 * half % (len(block) - 2 * half + 1)
        ours.append(timed(first, x))
        theirs.append(timed(functional.linear, x, second.weight))
        read.append(timed(torch.dot, block[at : at + half], block[at + half : at + 2 * half]))
    ours, theirs, read = ours[2:], theirs[2:], read[2:]
    microseconds = statistics.median(ours)
    return Result(
        *weight.shape,
        rows,
        microseconds,
        weight.nbytes / microseconds / 1e3,
        statistics.median(r / o for r, o in zip(read, ours)),
        statistics.median(t / o for t, o in zip(theirs, ours)),
    )


def call_overhead() -> dict[str, float]:
    """Microseconds of a call on one output: medians."""
    one = torch.zeros(1, 16, dtype=torch.bfloat16)
    plain = SmallLinear(one)
    lane = SmallLinear(one, None, [Lora(torch.zeros_like(one), one[:, :1], 1.0)])
    calls: dict[str, Callable[[], object]] = {
        "SmallLinear": lambda: plain(one),
        "SmallLinear, LoRA on a row": lambda: lane(one, ((0, 1, 0),)),
        "torch": lambda: functional.linear(one, one),
    }
    return {name: statistics.median(timed(call) for _ in range(3000)) for name, call in calls.items()}


def table(results: list[Result]) -> str:
    rows = sorted({result.rows for result in results})
    lines = ["| weight | " + " | ".join(f"{n} row{'s' * (n > 1)}" for n in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for shape in dict.fromkeys((r.out_features, r.in_features) for r in results):
        cells = {
            r.rows: f"{r.microseconds:.0f}, {r.gigabytes:.1f}, {r.of_read:.0%}, {r.speedup:.1f}x"
            for r in results
            if (r.out_features, r.in_features) == shape
        }
        lines.append(f"| {shape[0]} x {shape[1]} | " + " | ".join(cells.get(n, "") for n in rows) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch and of the core (default: 1)")
    parser.add_argument("--cpu-time", action="store_true", help="count this thread's time only: for a busy machine")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="whose shapes (default: all)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 5, 8, 16, 32, 64, 128])
    parser.add_argument("--seconds", type=float, default=0.3, help="per case (default: 0.3)")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    if SmallLinear(torch.zeros(1, 1, dtype=torch.bfloat16))._handle is None:
        raise SystemExit("small_linear runs in PyTorch here: it needs the C++ core, and AVX2")
    torch.set_num_threads(options.threads)
    if options.cpu_time:
        if options.threads > 1:
            parser.error("--cpu-time counts one thread: it needs --threads 1")
        global clock
        clock = time.thread_time
    torch.manual_seed(0)

    block = torch.ones(2 * COLD // 4)
    results = []
    with torch.inference_mode():
        overhead = call_overhead()
        for model in options.models:
            for out, width in MODELS[model]:
                weight = torch.randn(out, width).mul_(width**-0.5).to(torch.bfloat16)
                linears = [SmallLinear(weight.clone()) for _ in range(-(-COLD // weight.nbytes))]
                results += [measure(linears, block, rows, options.seconds) for rows in options.rows]
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instruction set": os.environ.get("GENARM_FAST_ISA") or _native.core.instruction_sets()[0],
        "torch": torch.__version__,
        "threads": options.threads,
        "clock": "CPU time" if options.cpu_time else "wall",
        "read bandwidth, GB/s": round(statistics.median(r.gigabytes / r.of_read for r in results), 1),
    } | {f"call of {name}, µs": round(value, 1) for name, value in overhead.items()}
    print(", ".join(f"{name}: {value}" for name, value in machine.items()), end="\n\n")
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": [asdict(r) for r in results]}, indent=1))


if __name__ == "__main__":
    main()
