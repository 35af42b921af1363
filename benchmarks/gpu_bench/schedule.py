"""Rows of a benchmark within a budget of time: after each one, what is known is on disk."""

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
from typing import Any

LEAST = 2.0  # seconds, below which nothing is begun
AGAIN = 15.0  # seconds after which it rings once more: Python swallows what is raised at the end of an object


class Skip(Exception):
    """What a row needs is not here; its words say what."""


class TimeIsUp(BaseException):
    """A row has used its time. No handler of errors on the way should take it for one of its own."""


@dataclass(frozen=True)
class Row:
    """run: gives the row's numbers. share: of the budget, that the row may take at most, even one that hangs. group:
    rows of one group share what they have loaded."""

    name: str
    run: Callable[[Any], dict[str, Any]]
    share: float = 0.15
    group: str = ""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeIsUp inside when the time is up; a call into a library that blocks is not interrupted."""

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
    rows: Sequence[Row], bench: Any, result: dict[str, Any], path: Path, seconds: float,
    say: Callable[[str], None] = print, clock: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """Run the rows in order into `result["rows"]`, which is in the file after each.

    A row has its numbers; or `skipped` with the reason, also where no time is left; or `error`. The last two have
    `so_far` as well: what the row had left in `bench.so_far` until then. bench.leave() is called between groups, and
    with it memory is given back; where that fails, as all does once a GPU has failed, `leaving` says why.
    """
    end, group = clock() + seconds, None
    result["rows"] = []
    for row in rows:
        left = end - clock()
        entry: dict[str, Any] = {"name": row.name}
        bench.so_far = {}
        start = clock()
        try:
            if left < LEAST:
                raise Skip(f"no time left of {seconds:g} s")
            if row.group != group:
                bench.leave()
                group = row.group
            limit = min(left, max(row.share * seconds, LEAST))
            with at_most(limit):
                entry |= row.run(bench)
        except Skip as why:
            entry["skipped"] = str(why)
        except TimeIsUp:
            entry["skipped"] = f"not done after {limit:.0f} s"
            leave(bench, entry)
        except Exception as error:  # the other rows count all the same
            entry["error"] = f"{type(error).__name__}: {error}"
            entry["traceback"] = traceback.format_exc(limit=-6)
            leave(bench, entry)
        entry["seconds"] = round(clock() - start, 2)
        result["rows"].append(entry)
        write(result, path)
        say(line(entry))


def leave(bench: Any, entry: dict[str, Any]) -> None:
    """After a row that was cut short, whose entry has what it left."""
    if bench.so_far:
        entry["so_far"] = bench.so_far
    try:
        bench.leave()
    except Exception as error:
        entry["leaving"] = f"{type(error).__name__}: {error}"


def write(result: dict[str, Any], path: Path) -> None:
    """All of it or, if the process dies meanwhile, what was there before."""
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
