"""Shows where a step's time goes: a table of the ranges in a profile, a trace to open, and a picture of one step.

    OMP_NUM_THREADS=1 python benchmarks/profiled.py [BASE ARM ...] [--tokens 16] [--k 3] [--out FOLDER]

Without a BASE, the demo's base and its ARM `small` are used. The script writes trace.json (for
https://ui.perfetto.dev), ranges.json and step.png into FOLDER. Where there is a GPU, `benchmarks/profile.sh` profiles
with Nsight: it runs this script with `--nsight`, which does the same work without a profiler. docs/profiling.md reads a
trace line by line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from result_files import machine
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from genarm_fast import ARM, GenARM, demo
from genarm_fast.speculation import Speculation

PROMPT = "How was the film that you saw last night?"
ROOT = "step"


@dataclass(frozen=True)
class Range:
    """A named range of the trace. start, end: microseconds since the trace began.

    depth: the number of ranges around it. own: its microseconds without those of the ranges inside it."""

    name: str
    start: float
    end: float
    depth: int
    own: float


def ranges(events: Sequence[Any]) -> list[Range]:
    """Return the steps in `profile.events()` and the ranges inside them, in the order of their starts."""
    named = [event for event in events if event.is_user_annotation and not event.name.startswith("ProfilerStep")]
    named.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
    begin = named[0].time_range.start if named else 0.0
    found: list[tuple[Any, int]] = []
    inner: dict[int, float] = {}  # id of a range -> microseconds of the ranges directly inside it
    around: list[Any] = []
    for event in named:
        while around and event.time_range.start >= around[-1].time_range.end:
            around.pop()
        if around:
            inner[id(around[-1])] = inner.get(id(around[-1]), 0.0) + event.time_range.elapsed_us()
        if around or event.name == ROOT:
            found.append((event, len(around)))
            around.append(event)
    return [
        Range(
            event.name,
            event.time_range.start - begin,
            event.time_range.end - begin,
            depth,
            event.time_range.elapsed_us() - inner.get(id(event), 0.0),
        )
        for event, depth in found
    ]


def summary(found: Sequence[Range]) -> list[dict[str, Any]]:
    """Return a line for each name: how often a step has such a range, its milliseconds, and its share of all steps.

    The share counts a range's own time, without the ranges inside it; the largest share comes first."""
    steps = [each for each in found if each.name == ROOT]
    total = sum(each.end - each.start for each in steps)
    lines = []
    for name in dict.fromkeys(each.name for each in found):
        same = [each for each in found if each.name == name]
        own = sum(each.own for each in same)
        line: dict[str, Any] = {"range": name, "a step": len(same) / len(steps)}
        line["ms"] = sum(each.end - each.start for each in same) / len(same) / 1e3
        lines.append(line | {"own ms": own / len(same) / 1e3, "share": own / total})
    return sorted(lines, key=lambda line: -line["share"])


def middle_step(found: Sequence[Range]) -> list[Range]:
    """Return the ranges of the step of median length, which is neither the first step nor a disturbed one."""
    steps = sorted((each for each in found if each.name == ROOT), key=lambda each: each.end - each.start)
    step = steps[len(steps) // 2]
    return [each for each in found if step.start <= each.start and each.end <= step.end]


def draw(found: Sequence[Range], path: Path) -> None:
    """Draw one step: a bar for each range, below the bar of the range around it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(each.name for each in found))
    colours = dict(zip(names, plt.get_cmap("tab20").colors * len(names)))  # type: ignore[attr-defined]
    begin, height = found[0].start, 1 + max(each.depth for each in found)
    figure, axis = plt.subplots(figsize=(11, 1.5 + 0.6 * height), layout="constrained")
    for each in found:
        left, width = (each.start - begin) / 1e3, (each.end - each.start) / 1e3
        axis.barh(each.depth, width, left=left, height=0.9, color=colours[each.name], edgecolor="white", linewidth=0.5)
        if width > 0.05 * (found[0].end - begin) / 1e3:
            axis.text(left + width / 2, each.depth, each.name, ha="center", va="center", fontsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    axis.legend(handles, names, fontsize=7, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, -0.25))
    axis.set(xlabel="ms", yticks=[], title="one step, from left to right; a range lies below the one it is a part of")
    axis.invert_yaxis()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def show(lines: Sequence[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for column in ("range", "times a step", "ms each", "ms without inner ranges", "share of all steps"):
        table.add_column(column, justify="left" if column == "range" else "right")
    for line in lines:
        cells = (f"{line['a step']:.2f}", f"{line['ms']:.2f}", f"{line['own ms']:.2f}", f"{line['share']:.1%}")
        table.add_row(line["range"], *cells)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", help="a model's folder")
    parser.add_argument("arms", nargs="*", metavar="arm", help="folders of ARMs")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--k", type=int, default=0, help="drafts of a step, by the first ARM")
    parser.add_argument("--out", type=Path, default=Path("profile"))
    parser.add_argument("--nsight", action="store_true", help="leave profiling to Nsight around this process")
    args = parser.parse_args()
    base = args.base or str(demo.base())
    model = GenARM.from_pretrained(base, [ARM(arm) for arm in args.arms] if args.base else ARM(demo.arm("small")))
    plan = Speculation(model.arm_names[0], args.k) if args.k else "off"
    options: dict[str, Any] = {"max_new_tokens": args.tokens, "ignore_eos": True, "seed": 1, "speculation": plan}
    prompts = [PROMPT] * args.batch
    model.warm_up(batch_sizes=args.batch, speculation=plan)
    model.generate(prompts, **options)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with nullcontext() if args.nsight else profile(activities=activities) as trace:
        model.generate(prompts, **options)
    if args.nsight:
        return
    found, about = ranges(trace.events()), machine()
    args.out.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(args.out / "trace.json"))
    lines = summary(found)
    (args.out / "ranges.json").write_text(json.dumps({"machine": about, "ranges": lines}, indent=1) + "\n")
    draw(middle_step(found), args.out / "step.png")
    show(lines, f"{args.batch} request(s), {args.k} drafts a step; {about['device']}, {about['date']}")
    print(f"{args.out}/trace.json, ranges.json, step.png")


if __name__ == "__main__":
    main()
