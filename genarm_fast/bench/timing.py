"""Time contenders fairly: in turn, round by round, after a round that does not count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import torch

CONFIDENCE = 0.9
LEAST_ROUNDS = 5  # fewer rounds can't give an interval of that confidence
ACCELERATORS = ("cuda", "xpu", "mps")


@dataclass(frozen=True)
class Interval:
    """A median of rounds, and bounds for the true median with 90 % confidence, for any distribution.

    The bounds are figures of two of the rounds.
    """

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the width, relative to the median."""
        return (self.high - self.low) / 2 / self.median


def interval(values: Sequence[float]) -> Interval:
    """Return the interval of one or more values. With fewer than LEAST_ROUNDS, low and high are the extremes."""
    ordered, count = sorted(values), len(values)
    # The median is beyond the i-th of n values with probability Σ_{j<i} C(n, j) / 2^n.
    skipped, outside = 0, 1
    while 2 * (outside + comb(count, skipped + 1)) <= (1 - CONFIDENCE) * 2**count:
        skipped += 1
        outside += comb(count, skipped)
    return Interval(statistics.median(ordered), ordered[skipped], ordered[count - 1 - skipped])


def take_turns(
    runs: Mapping[str, Callable[[int], Any]],
    rounds: int,
    clock: Callable[[], float],
    ran: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Return the seconds of each run in each round.

    A run gets the number of its round: round 0 warms up and is not timed. `ran` is called after each run, outside the
    clock. Every round begins with another run, so that no run always has the same neighbour.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            runs[name](turn)
            spent = clock() - start
            if turn:
                seconds[name].append(spent)
            ran()
    return seconds


def clock_of(devices: Iterable[torch.device]) -> tuple[str, Callable[[], float]]:
    """Return a clock for work on these devices, and its name.

    On the CPU with one thread it is the process's CPU time, which does not count the time of other processes. Otherwise
    it is the wall clock, read when the devices have finished all their work.
    """
    busy = {device for device in devices if device.type in ACCELERATORS}
    if not busy and torch.get_num_threads() == 1:
        return "CPU time", time.process_time

    def wall() -> float:
        for device in busy:
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    return "wall clock", wall
