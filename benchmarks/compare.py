"""Compares two result files of `make bench`, and fails on losses beyond noise.

    python benchmarks/compare.py BEFORE.json AFTER.json [--tolerance 0.05]

The compared figure is how many times as fast as each contender our function is. Each file took it within its own
rounds, so a busy machine slows both sides of the ratio. A loss is beyond noise if the two 90 % intervals do not touch
and the medians differ by more than the tolerance. A case that only BEFORE has is named and fails too, since nothing
shows that its speed was kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from genarm_fast.bench.timing import Interval

Key = tuple[str, str, str]  # (benchmark, case, contender)
TOLERANCE = 0.05


@dataclass(frozen=True)
class Change:
    """The change of one speed-up. ratio: after / before. verdict: "loss", "gain", or "" if noise may explain it."""

    key: Key
    before: Interval
    after: Interval
    ratio: float
    verdict: str


def figures(found: Mapping[str, Any]) -> dict[Key, Interval]:
    return {
        (result["benchmark"], result["case"], name): Interval(**figure)
        for result in found["results"]
        for name, figure in result["speedup"].items()
    }


def changes(before: Mapping[str, Any], after: Mapping[str, Any], tolerance: float) -> tuple[list[Change], list[Key]]:
    """Return the changes of all keys that both files have, and the keys that only `before` has."""
    old, new = figures(before), figures(after)
    found = []
    for key in old.keys() & new.keys():
        ratio, verdict = new[key].median / old[key].median, ""
        if new[key].high < old[key].low and ratio < 1 - tolerance:
            verdict = "loss"
        elif new[key].low > old[key].high and ratio > 1 + tolerance:
            verdict = "gain"
        found.append(Change(key, old[key], new[key], ratio, verdict))
    return sorted(found, key=lambda change: (change.ratio, change.key)), sorted(old.keys() - new.keys())


def show(found: list[Change], missing: list[Key], console: Console) -> None:
    table = Table()
    for column in ("benchmark", "case", "against", "before", "after", "after / before", ""):
        table.add_column(column)
    for change in found:
        intervals = (f"{i.median:.2f} [{i.low:.2f}, {i.high:.2f}]" for i in (change.before, change.after))
        table.add_row(*change.key, *intervals, f"{change.ratio:.3f}", change.verdict)
    console.print(table)
    for key in missing:
        console.print(f"missing in the second file: {', '.join(key)}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="least loss that counts (default: 0.05)")
    args = parser.parse_args()
    before, after = (json.loads(path.read_text()) for path in (args.before, args.after))
    console = Console()
    for about in ("device", "threads", "torch"):
        if before["machine"][about] != after["machine"][about]:
            console.print(f"mind: {about} was {before['machine'][about]}, is {after['machine'][about]}")
    found, missing = changes(before, after, args.tolerance)
    show(found, missing, console)
    sys.exit(any(change.verdict == "loss" for change in found) or bool(missing))


if __name__ == "__main__":
    main()
