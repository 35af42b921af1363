"""Compares arm_logps with full logits, forward and backward, in time and in memory.

    python benchmarks/arm_logps.py [--shape N T V] [--width H] [--rounds N] [--cpu-time]

LoRA training freezes the head, so that only the hidden states need a gradient. Memory is the largest amount that torch
held at once beyond the inputs. The two functions take turns; times are medians, and ratios are medians of the ratios of
single turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from genarm_fast.kernels.arm_logps import arm_logps, arm_logps_reference

FUNCTIONS = {"ours": arm_logps, "full logits": arm_logps_reference}


class Step:
    """A forward and backward pass over one batch."""

    def __init__(self, shape: list[int], width: int, frozen: bool) -> None:
        rows, length, vocab = shape
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(rows, length, width, generator=generator, requires_grad=True)
        self.weight = torch.randn(vocab, width, generator=generator).mul_(0.05).requires_grad_(not frozen)
        self.labels = torch.randint(0, vocab, (rows, length), generator=generator)

    def run(self, name: str) -> None:
        FUNCTIONS[name](self.hidden, self.weight, self.labels).sum().backward()
        self.hidden.grad = self.weight.grad = None


def peak_memory(step: Step, name: str) -> float:
    """Return the largest amount of memory that a step held at once beyond its inputs, in MiB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step.run(name)
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[4, 512, 49152], metavar=("N", "T", "V"))
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="count this thread's time only: for a busy machine")
    options = parser.parse_args()
    clock = time.thread_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(1)
    print("| head | seconds: ours, full logits, ratio | MiB: ours, full logits, ratio |\n|---|---|---|")
    for frozen in (True, False):
        step = Step(options.shape, options.width, frozen)
        times: dict[str, list[float]] = {name: [] for name in FUNCTIONS}
        for _ in range(options.rounds + 1):
            for name in FUNCTIONS:
                start = clock()
                step.run(name)
                times[name].append(clock() - start)
        seconds = [statistics.median(found[1:]) for found in times.values()]
        ratio = statistics.median(mine / other for mine, other in zip(*(found[1:] for found in times.values())))
        ours, full = (peak_memory(step, name) for name in FUNCTIONS)
        cells = f"{seconds[0]:.2f}, {seconds[1]:.2f}, {ratio:.2f}"
        print(f"| {'frozen' if frozen else 'trained'} | {cells} | {ours:.0f}, {full:.0f}, 1/{full / ours:.1f} |")


if __name__ == "__main__":
    main()
