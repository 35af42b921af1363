"""Run the rows of a benchmark within a time budget. After each row, the result so far is on disk."""

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

# Seconds between two rings of the alarm. Python swallows an exception in an object's `__del__`, so one may get lost.
AGAIN = 15.0
SLACK = 3  # factor of a row's estimate after which the row is stopped
LEAST = 25.0  # least seconds before a row is stopped, since an estimate of a few seconds may be far off
RESERVE = 12.0  # seconds at the end of the budget for the table and the picture


class Skip(Exception):
    """A row cannot run here. The message says what it lacks."""


class TimeIsUp(BaseException):
    """A row has used up its time. This is no Exception, so that no handler inside the row catches it."""


@dataclass(frozen=True)
class Row:
    """A row of the benchmark.

    run: returns the row's numbers. seconds: the estimate for an H100, with compiled kernels; a row whose estimate
    exceeds the time that is left is not started. group: rows of one group share the models that they have loaded. most:
    seconds after which the row is stopped; 0 means SLACK times the estimate, but at least LEAST.
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
    """Runs rows, for example in other processes."""

    def run(self, row: Row, seconds: float, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Run a row for at most `seconds` and return its entry. keep: called with the row's numbers so far."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp in the block after `seconds`. A library call that blocks is not interrupted."""

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

    end: time of `clock` by which the last row has to end. slower: factor of all estimates, above 1 in a trial.

    The entry of a row holds its numbers, or `skipped` with the reason, or `error` with a traceback. A row that was
    stopped or failed also has `so_far`, the numbers that it had by then. While a row runs, `result["running"]` holds
    its name and these numbers, so a run that is killed leaves them in the file.
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
    """Run a row in this process. Return its numbers, or the reason that it has none and its numbers so far."""
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
    """Replace the file in one step. If the process dies meanwhile, the file keeps its old content."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1))
    os.replace(partial, path)


def line(entry: dict[str, Any]) -> str:
    """Return one line on a row: the reason that it has no numbers, or the numbers at its top level."""
    what = next((f"{word}: {entry[word]}" for word in ("skipped", "error") if word in entry), None)
    if what is None:
        numbers = {k: v for k, v in entry.items() if isinstance(v, (int, float, str)) and k not in ("name", "seconds")}
        what = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
    return f"[{entry['seconds']:6.1f} s] {entry['name']}: {what}"


def not_finite(value: Any, where: str = "") -> list[str]:
    """Return the paths of all NaNs and infinities in a result."""
    if isinstance(value, dict):
        return [found for key, each in value.items() for found in not_finite(each, f"{where}/{key}")]
    if isinstance(value, list):
        return [found for i, each in enumerate(value) for found in not_finite(each, f"{where}/{i}")]
    return [where] if isinstance(value, float) and not math.isfinite(value) else []
