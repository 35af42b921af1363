"""Compares quant_linear with 8 and 4 bits on the CPU with small_linear over the same matrices in bfloat16.

    python benchmarks/quant_linear.py [--cpu-time] [--threads N] [--models NAME ...] [--rows N ...] [--seconds S]

Weights are cold, as in a decode step: the copies of a matrix fill 400 MB, and every call takes the next copy. Each case
is first checked against the dequantised weights in float64. In a turn each contender runs eight calls, or one from
about 13 MB on, after one uncounted call. A cell shows the microseconds of bfloat16, and how many times as fast 8 and 4
bits are: medians of the ratios within a turn. The last line of a model weighs its shapes by their number in a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice

import torch
from torch import Tensor

from genarm_fast.kernels import QuantLinear, SmallLinear, _native
from genarm_fast.kernels.quant_linear import dequantize, quantize

SHAPES: dict[str, list[tuple[int, int, int]]] = {  # (outputs, inputs, products of this shape in a step)
    "smollm2-135m": [(960, 576, 30), (576, 576, 30), (3072, 576, 30), (576, 1536, 30), (49152, 576, 1)],
    "2048-wide": [(3072, 2048, 16), (2048, 2048, 16), (16384, 2048, 16), (2048, 8192, 16)],
}
COLD = 400 << 20  # bytes of all copies of a matrix, more than the caches hold
CALLS = 8
BITS = (8, 4)


def timed(clock: Callable[[], float], calls: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """Return the mean microseconds of a call, without the first call."""
    calls[0](x)
    start = clock()
    for call in calls[1:]:
        call(x)
    return (clock() - start) * 1e6 / (len(calls) - 1)


class Contenders:
    """The copies of one matrix in bfloat16, 8 bits and 4 bits."""

    def __init__(self, out: int, width: int) -> None:
        weight = torch.randn(out, width).mul_(width**-0.5).to(torch.bfloat16)
        self.width, self.calls = width, CALLS if weight.nbytes < COLD // 32 else 1
        self.all: dict[int, list[SmallLinear | QuantLinear]] = {
            16: [SmallLinear(weight.clone()) for _ in range(-(-COLD // weight.nbytes))]
        }
        for bits in BITS:
            first = QuantLinear(quantize(weight, bits))
            packed = [first.packed.clone() for _ in range(-(-COLD // first.packed.nbytes))]
            self.all[bits] = [QuantLinear.from_packed(copy, out, width, bits) for copy in packed]

    def check(self, rows: int) -> None:
        x = torch.randn(rows, self.width).to(torch.bfloat16)
        for bits in BITS:
            linear = self.all[bits][0]
            assert isinstance(linear, QuantLinear)
            exact = x.double() @ dequantize(linear.weight)[:512].double().T
            torch.testing.assert_close(linear(x)[:, :512].double(), exact, rtol=2**-8, atol=1e-3)

    def measure(self, rows: int, seconds: float, clock: Callable[[], float]) -> dict[int, float]:
        """Return, by bits: at 16 the microseconds of bfloat16, at 8 and 4 how many times as fast these are."""
        x = torch.randn(rows, self.width).to(torch.bfloat16)
        own = {bits: cycle(linears) for bits, linears in self.all.items()}
        turns: list[dict[int, float]] = []
        end = time.perf_counter() + seconds
        while len(turns) < 6 or (time.perf_counter() < end and len(turns) < 200):
            turns.append({bits: timed(clock, list(islice(own[bits], self.calls + 1)), x) for bits in own})
        found = {bits: statistics.median(turn[16] / turn[bits] for turn in turns[1:]) for bits in BITS}
        return {16: statistics.median(turn[16] for turn in turns[1:]), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of the core (default: 1)")
    parser.add_argument("--cpu-time", action="store_true", help="count this thread's time only: for a busy machine")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), help="whose shapes (default: all)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 256])
    parser.add_argument("--seconds", type=float, default=2.0, help="per case (default: 2)")
    options = parser.parse_args()
    if options.cpu_time and options.threads > 1:
        parser.error("--cpu-time counts one thread: it needs --threads 1")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    measured = "CPU time" if options.cpu_time else "wall"
    print(f"{_native.instruction_set()}, threads: {options.threads}, clock: {measured}\n")
    print(f"| weight | {' | '.join(f'{rows} rows' for rows in options.rows)} |\n|{'---|' * (len(options.rows) + 1)}")
    with torch.inference_mode():
        for model in options.models:
            sums: dict[int, dict[int, float]] = {rows: dict.fromkeys((16, *BITS), 0.0) for rows in options.rows}
            for out, width, times in SHAPES[model]:
                contenders, cells = Contenders(out, width), []
                for rows in options.rows:
                    contenders.check(rows)
                    found = contenders.measure(rows, options.seconds, clock)
                    cells.append(f"{found[16]:.0f} µs, {found[8]:.2f}x, {found[4]:.2f}x")
                    sums[rows][16] += times * found[16]
                    for bits in BITS:
                        sums[rows][bits] += times * found[16] / found[bits]
                print(f"| {out} x {width} | {' | '.join(cells)} |", flush=True)
            cells = [f"{s[16] / 1e3:.1f} ms, {s[16] / s[8]:.2f}x, {s[16] / s[4]:.2f}x" for s in sums.values()]
            print(f"| **{model}, a step** | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
