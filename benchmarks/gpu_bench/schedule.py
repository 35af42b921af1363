"""Rows of a benchmark within a budget of time: after each row, what is known is on disk."""

from __future__ import annotations

import json
import math
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

AGAIN = 15.0  # Seconds after which the alarm rings once more: Python swallows an exception at the end of an object.
SLACK = 3  # A row is stopped after this many times its estimate,
LEAST = 25.0  # but not before this many seconds: an estimate of a few seconds may be far off.
RESERVE = 12.0  # seconds at the end of the budget for the table and the picture


class Skip(Exception):
    """A row cannot run here. The message says what it lacks."""


class TimeIsUp(BaseException):
    """A row has used its time. It is no Exception, so that no handler on the way takes it for an error of its own."""


@dataclass(frozen=True)
class Row:
    """A row of the benchmark.

    run: gives the row's numbers. seconds: the estimate for an H100, with compiled kernels; a row whose estimate
    exceeds the time that is left is not begun. group: rows of one group share the models that they have loaded. most:
    seconds after which the row is stopped; 0: SLACK times the estimate, or LEAST.
    """

    name: str
    run: Callable[[Any], dict[str, Any]]
    seconds: float = 10.0
    group: str = ""
    most: float = 0.0

    @property
    def limit(self) -> float:
        return self.most or max(SLACK * self.seconds, LEAST)


class Runner(Protocol):
    """Where rows run."""

    def run(self, row: Row, seconds: float, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Run a row for at most so many seconds and return its entry. keep: gets what the row has so far."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp inside when the time is up. A call into a library that blocks is not interrupted."""

    def ring(*_: Any) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_all(
    rows: Sequence[Row], runner: Runner, result: dict[str, Any], path: Path, end: float, *, slower: float = 1.0,
    say: Callable[[str], None] = print, clock: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """Run the rows in order into `result["rows"]`, and write the file before and after each of them.

    end: time of `clock` at which the last row has ended. slower: factor of all estimates, above 1 in a trial.

    A row has its numbers; or `skipped` with the reason; or `error` and its traceback. The last two have `so_far` as
    well, the numbers that the row had by then. While a row runs, `result["running"]` has its name and these numbers:
    a run that is killed leaves them in the file.
    """
    result["rows"] = []
    for row in rows:
        start, left = clock(), end - clock()
        entry: dict[str, Any] = {"name": row.name}
        if left < slower * row.seconds:
            entry["skipped"] = (
                f"no time: it takes about {slower * row.seconds:.0f} s, and {max(left, 0):.0f} s are left"
            )
        else:
            result["running"] = running = dict(entry)
            write(result, path)

            def keep(so_far: dict[str, Any], running: dict[str, Any] = running) -> None:
                running["so_far"] = so_far
                write(result, path)

            entry |= runner.run(row, min(left, slower * row.limit), keep)
            del result["running"]
        entry["seconds"] = round(clock() - start, 2)
        result["rows"].append(entry)
        result["no_time_for"] = [row["name"] for row in result["rows"] if str(row.get("skipped")).startswith("no time")]
        write(result, path)
        say(line(entry))


def attempt(row: Row, bench: Any, seconds: float) -> dict[str, Any]:
    """Run a row in this process: its numbers, or why it has none and what it had so far."""
    try:
        with at_most(seconds):
            return row.run(bench)
    except Skip as why:
        entry: dict[str, Any] = {"skipped": str(why)}
    except TimeIsUp:
        entry = {"skipped": f"not done after {seconds:.0f} s", "traceback": traceback.format_exc(limit=-6)}
    except Exception as error:
        entry = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc(limit=-12)}
    if bench.so_far:
        entry["so_far"] = dict(bench.so_far)
    return entry


def write(result: dict[str, Any], path: Path) -> None:
    """Replace the file at once: if the process dies meanwhile, the file has what it had before."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1))
    os.replace(partial, path)


def line(entry: dict[str, Any]) -> str:
    """A row in a line: why it has no numbers, or the numbers at its top."""
    what = next((f"{word}: {entry[word]}" for word in ("skipped", "error") if word in entry), None)
    if what is None:
        numbers = {k: v for k, v in entry.items() if isinstance(v, (int, float, str)) and k not in ("name", "seconds")}
        what = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
    return f"[{entry['seconds']:6.1f} s] {entry['name']}: {what}"


def not_finite(value: Any, where: str = "") -> list[str]:
    """Where a result has numbers that are none."""
    if isinstance(value, dict):
        return [found for key, each in value.items() for found in not_finite(each, f"{where}/{key}")]
    if isinstance(value, list):
        return [found for i, each in enumerate(value) for found in not_finite(each, f"{where}/{i}")]
    return [where] if isinstance(value, float) and not math.isfinite(value) else []
