"""Registers and measures benchmarks, and keeps their results. A benchmark is a function that yields cases.

    @benchmark
    def silu_mul() -> Iterator[Case]:
        '''silu(gate) · up'''
        for rows in (1, 8):
            gate, up = torch.randn(2, rows, 1536)
            yield Case(f"{rows} rows", {"ours": lambda: ops.silu_mul(gate, up), "PyTorch": lambda: silu(gate) * up})

The first contender of a case is this library's. All contenders take turns, and each round begins with another one
(`genarm_fast.bench.timing`). Figures are medians with the interval in which the true median lies with 90 % confidence.
Speed-ups are taken within rounds, so that a busy machine disturbs both sides alike. Short calls are repeated until a
turn takes two milliseconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from result_files import machine, name_of
from rich.console import Console
from rich.table import Table

from genarm_fast.bench.timing import Interval, clock_of, interval, take_turns

TURN_SECONDS = 2e-3
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """Contenders that do the same work, by name, this library's first. device: where they run, which sets the clock."""

    name: str
    runs: Mapping[str, Callable[[], Any]]
    device: str = "cpu"


BENCHMARKS: dict[str, Callable[[], Iterator[Case]]] = {}


def benchmark(function: Callable[[], Iterator[Case]]) -> Callable[[], Iterator[Case]]:
    """Register a benchmark under the name of its function. Its docstring says what it measures."""
    name = function.__name__
    if name in BENCHMARKS:
        raise ValueError(f"benchmark {name!r}: expected a name that is not taken")
    BENCHMARKS[name] = function
    return function


class Repeated:
    """A contender that repeats its call within a turn. The warm-up turn finds how many calls take TURN_SECONDS."""

    def __init__(self, run: Callable[[], Any], clock: Callable[[], float]) -> None:
        self.run, self.clock, self.calls = run, clock, 1

    def __call__(self, turn: int) -> None:
        if turn == 0:
            self.run()  # the first call compiles, allocates and fills caches
            start = self.clock()
            self.run()
            self.calls = max(1, min(10_000, round(TURN_SECONDS / max(self.clock() - start, 1e-7))))
            return
        for _ in range(self.calls):
            self.run()


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Return each contender's microseconds per call, and how many times as fast the first one is as each other one."""
    ours = next(iter(case.runs))
    clock_name, clock = clock_of([torch.device(case.device)])
    runs = {name: Repeated(run, clock) for name, run in case.runs.items()}
    turns = take_turns(runs, rounds, clock)
    each = {name: [1e6 * spent / runs[name].calls for spent in found] for name, found in turns.items()}
    others = [name for name in each if name != ours]
    return {
        "case": case.name,
        "clock": clock_name,
        "ours": ours,
        "microseconds": {name: asdict(interval(found)) for name, found in each.items()},
        "speedup": {name: asdict(interval([b / a for a, b in zip(each[ours], each[name])])) for name in others},
    }


def run(names: Sequence[str], rounds: int, console: Console | None = None) -> dict[str, Any]:
    """Measure the named benchmarks and return the contents of a result file."""
    results = []
    for name in names:
        for case in BENCHMARKS[name]():
            results.append({"benchmark": name} | measure(case, rounds))
            if console:
                console.print(f"{name}: {case.name}: {speedups(results[-1])}", highlight=False)
    return {"machine": machine(), "rounds": rounds, "results": results}


def text(figure: Mapping[str, float]) -> str:
    found = Interval(**figure)
    return f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}]"


def speedups(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{text(figure)} x {name}" for name, figure in result["speedup"].items())


def table(found: Mapping[str, Any]) -> Table:
    about = found["machine"]
    title = f"{about['device']}, {about['threads']} thread(s), load {about['load']}, {about['date']}"
    shown = Table(title=title)
    for column in ("benchmark", "case", "µs a call", "times as fast as"):
        shown.add_column(column, justify="right" if column == "µs a call" else "left")
    for result in found["results"]:
        ours = result["microseconds"][result["ours"]]["median"]
        shown.add_row(result["benchmark"], result["case"], f"{ours:,.1f}", speedups(result))
    return shown


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Plot the speed-ups with their intervals: a bar for each contender but the first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [
        (f"{result['benchmark']}, {result['case']}: {name}", figure)
        for result in found["results"]
        for name, figure in result["speedup"].items()
    ]
    figure, axis = plt.subplots(figsize=(9, 1 + 0.25 * len(bars)), layout="constrained")
    medians = [each["median"] for _, each in bars]
    spread = [[each["median"] - each["low"] for _, each in bars], [each["high"] - each["median"] for _, each in bars]]
    axis.barh([label for label, _ in bars], medians, xerr=spread, color="#4878a8", ecolor="#555555")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", xlabel="times as fast as")
    axis.invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def default_path(about: Mapping[str, Any]) -> Path:
    """Return the path benchmarks/results/<date>-<machine>.json."""
    return RESULTS / f"{about['date']}-{name_of(about)}.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the registered benchmarks, write results, table and plot.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="of turns (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="with one, CPU time is counted (default: 1)")
    parser.add_argument("--json", type=Path, help="result file (default: benchmarks/results/<date>-<machine>.json)")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.names if name not in BENCHMARKS]:
        parser.error(f"{unknown[0]!r}: expected a benchmark of {', '.join(BENCHMARKS)}")
    torch.set_num_threads(args.threads)
    console = Console()
    found = run(args.names or list(BENCHMARKS), args.rounds, console)
    path = args.json or default_path(found["machine"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    plot(found, path.with_suffix(".png"))
    console.print(table(found))
    console.print(f"{path}, {path.with_suffix('.png')}", highlight=False)
