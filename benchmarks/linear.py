"""Compares small_linear on the CPU with torch's linear of its dtype, and with the speed at which memory is read.

    python benchmarks/linear.py [--dtype float32] [--threads N] [--cpu-time] [--models NAME ...] [--rows N ...]
        [--json FILE]

A weight with several outputs means linears over one input, in one call of SiblingLinears. Weights are cold, as in a
decode step: the copies of a weight fill 512 MB, and every call takes the next copy. Each case is first checked against
float64. In a turn each contender runs eight calls, or one if the weights have 16 MB or more. One uncounted call
precedes them, since it finds its code outside the caches and the wide vector units asleep. The third contender is
torch.dot, which only reads the weights. Figures are medians over the turns. Speed-ups and shares of the read bandwidth
are medians of the ratios within a turn, so that a busy machine disturbs all contenders alike.
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
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from genarm_fast.kernels import Lora, SiblingLinears, SmallLinear, _native

Shape = tuple[tuple[int, ...], int]  # (outputs of each linear over one input, width of the input)
MODELS: dict[str, list[Shape]] = {
    "smollm2-135m": [
        *(((out,), width) for out, width in ((576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576))),
        *(((576, 192, 192), 576), ((1536, 1536), 576)),  # query, key and value; gate and up
    ],
    "2048-wide": [((out,), width) for out, width in ((2048, 2048), (8192, 2048), (2048, 8192), (128256, 2048))],
}
COLD = 512 << 20  # bytes of all copies of a weight, more than the caches hold
# Calls of a contender in a turn. A call after PyTorch's linear is a tenth slower than a call after one of its own kind.
CALLS = 8


@dataclass
class Result:
    out_features: tuple[int, ...]
    in_features: int
    rows: int
    microseconds: float
    gigabytes: float  # GB of weights per second
    of_read: float  # share of the read bandwidth that torch.dot reaches
    speedup: float  # torch's time over this time


clock = time.perf_counter


def timed(call: Callable[..., object], *arguments: object) -> float:
    start = clock()
    call(*arguments)
    return (clock() - start) * 1e6


def siblings(shape: Shape, dtype: torch.dtype) -> list[tuple[Tensor, SiblingLinears]]:
    """Return copies that fill COLD bytes: for each, the weights [sum of outputs, width] and the linears over them."""
    outs, width = shape
    weights = torch.randn(sum(outs), width).mul_(width**-0.5).to(dtype)
    copies = [weights.clone() for _ in range(-(-COLD // weights.nbytes))]
    return [(copy, SiblingLinears([SmallLinear(weight) for weight in copy.split(outs)])) for copy in copies]


def torch_linears(x: Tensor, *weights: Tensor) -> list[Tensor]:
    return [functional.linear(x, weight) for weight in weights]


def measure(copies: list[tuple[Tensor, SiblingLinears]], rows: int, seconds: float) -> Result:
    all_linears = [linears for _, linears in copies]
    weights = [[linear.weight for linear in linears.linears] for linears in all_linears]
    words = [both.view(torch.float32).flatten().chunk(2) for both, _ in copies]
    x, none = torch.randn(rows, copies[0][0].shape[1]).to(copies[0][0].dtype), ((),) * len(weights[0])
    for y, weight in zip(all_linears[0](x, none), weights[0]):
        exact = x.double() @ weight[:512].double().T
        torch.testing.assert_close(y[:, :512].double(), exact, rtol=torch.finfo(x.dtype).eps, atol=1e-4)

    size = copies[0][0].nbytes
    calls = CALLS if size < COLD // 32 else 1
    contenders: list[Callable[[int], float]] = [
        lambda i: timed(all_linears[i % len(copies)], x, none),
        lambda i: timed(torch_linears, x, *weights[i % len(copies)]),
        lambda i: timed(torch.dot, *words[i % len(copies)]),
    ]
    if len(none) == 1:
        contenders[0] = lambda i: timed(all_linears[i % len(copies)].linears[0], x)
        contenders[1] = lambda i: timed(functional.linear, x, *weights[i % len(copies)])
    turns: list[list[float]] = []  # microseconds of each contender
    end = clock() + seconds
    while len(turns) < 6 or (clock() < end and len(turns) < 60):
        cold = count(3 * (calls + 1) * len(turns))
        turns.append([sum([run(i) for i in islice(cold, calls + 1)][1:]) / calls for run in contenders])
    ours, theirs, read = zip(*turns[1:])
    microseconds = statistics.median(ours)
    return Result(
        tuple(map(len, weights[0])),
        x.shape[1],
        rows,
        microseconds,
        size / microseconds / 1e3,
        statistics.median(r / o for r, o in zip(read, ours)),
        statistics.median(t / o for t, o in zip(theirs, ours)),
    )


def call_overhead(dtype: torch.dtype) -> dict[str, float]:
    """Return the median microseconds of a call with one output."""
    one = torch.zeros(1, 16, dtype=dtype)
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
        lines.append(
            f"| {' + '.join(map(str, shape[0]))} x {shape[1]} | " + " | ".join(cells.get(n, "") for n in rows) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="of torch and of the core (default: 1)")
    parser.add_argument("--cpu-time", action="store_true", help="count this thread's time only: for a busy machine")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="whose shapes (default: all)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 5, 8, 16, 32, 64, 128])
    parser.add_argument("--seconds", type=float, default=0.3, help="per case (default: 0.3)")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    if SmallLinear(torch.zeros(1, 1, dtype=dtype))._core is None:
        raise SystemExit("small_linear runs in PyTorch here: it needs the C++ core, and AVX2")
    torch.set_num_threads(options.threads)
    if options.cpu_time:
        if options.threads > 1:
            parser.error("--cpu-time counts one thread: it needs --threads 1")
        global clock
        clock = time.thread_time
    torch.manual_seed(0)

    results = []
    with torch.inference_mode():
        overhead = call_overhead(dtype)
        for model in options.models:
            for shape in MODELS[model]:
                copies = siblings(shape, dtype)
                results += [measure(copies, rows, options.seconds) for rows in options.rows]
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instruction set": _native.instruction_set(),
        "torch": torch.__version__,
        "dtype": options.dtype,
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
