"""`python -m genarm_fast.demo`: shows in a terminal what guidance does.

1. Side by side: the base alone, guided by `positive` (an ARM of its own size), and guided by `small` (a far smaller
   ARM: weak-to-strong). Each token has the colour of its reward. The table shows tokens per second of each.
2. A sweep over the weights of `positive` and `concise`, which have opposite effects: a table and a plot.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import track
from rich.rule import Rule
from rich.text import Text

from genarm_fast.demo.assets import arm, base

PROMPTS = [
    "Describe a rainy Monday in the city.",
    "How was your stay at the hotel?",
    "What did you think of the film?",
]
SWEEP_PROMPTS = [
    "Write a review of a cheap airline.",
    "What is it like to miss the last train?",
    "Describe an old hospital.",
    "Tell me about a storm at sea.",
    "What do you think of working at night?",
    "Tell me about the winter in the north.",
    "How was the exam?",
    "Describe a house that nobody lives in.",
]
TEMPERATURE = 0.8
WEIGHTS = {"positive": 1.5, "small": 1.0}
JUDGE = "positive"  # its opinion colours the tokens of every answer
GRIDS = {"positive": (0.0, 0.5, 1.0), "concise": (0.0, 0.5, 1.0)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo, and return the exit status."""
    options = _parse(argv)
    recording = options.record is not None
    console = Console(stderr=options.json, highlight=False, record=recording, width=110 if recording else None)
    results = run(options, console)
    if recording:
        console.save_svg(str(options.record / "demo.svg"), title="make demo")
    if options.json:
        print(json.dumps(results, indent=2))
    return 0


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Show each part on `console` as soon as it is done. Return the same results as plain types."""
    status = Console(stderr=True, highlight=False)
    source = base()
    with _step(status, "loading the base and three ARMs"):
        import torch

        from genarm_fast import ARM, GenARM, SamplingParams
        from genarm_fast.demo.compare import compare, side_by_side, speed_table
        from genarm_fast.demo.sweep import sweep, sweep_plot, sweep_table
        from genarm_fast.demo.tint import legend

        arms = [ARM(arm(name), name=name) for name in ("positive", "concise", "small")]
        # On a CPU, 4 bits take less memory traffic, and "exact" changes no weight.
        exact = None if torch.cuda.is_available() else "exact"
        model = GenARM.from_pretrained(source, arms, dtype=torch.bfloat16, max_batch_size=36, quantization=exact)
    params = SamplingParams(temperature=TEMPERATURE, max_new_tokens=24 if options.quick else 48, seed=options.seed)
    prompts = options.prompt or (PROMPTS[:1] if options.quick else PROMPTS)

    guides = ", ".join(WEIGHTS)
    with _step(status, f"answering {len(prompts)} prompts without guidance and with that of {guides}"):
        # Loads the parts that load at first use, so that this time does not count.
        model.generate("Hello", weights=1.0, max_new_tokens=2)
        runs = compare(model, WEIGHTS, JUDGE, prompts, params)
    title = "The base, guided by an ARM of its size, and weak-to-strong by a small one"
    _part(console, title, side_by_side(runs, JUDGE, prompts, console), legend(JUDGE))
    _part(console, "Speed", speed_table(runs))

    bar = partial(track, description="sweeping over two ARMs' weights", console=status, transient=True)
    grids = {name: grid[::2] if options.quick else grid for name, grid in GRIDS.items()}
    points = sweep(model, grids, SWEEP_PROMPTS[: 2 if options.quick else None], params, bar)
    picture = (options.record or options.out) / "sweep.png"
    sweep_plot(points, grids, picture)
    _part(console, "Two ARMs, mixed in nine ways", sweep_table(points, grids), f"Plot: {picture}")
    return {
        "prompts": prompts,
        "judge": JUDGE,
        "runs": [asdict(run) for run in runs],
        "sweep": {"grids": grids, "points": [asdict(point) for point in points], "plot": str(picture)},
    }


def _part(console: Console, title: str, *content: RenderableType) -> None:
    for each in (Rule(Text(title, style="bold"), align="left"), *content, ""):
        console.print(each)


@contextmanager
def _step(status: Console, title: str) -> Iterator[None]:
    """Show what is running: a spinner on a terminal, and everywhere a line with the time that it took."""
    begin = time.perf_counter()
    with status.status(f"{title} ..."):
        yield
    status.print(f"{title}: {time.perf_counter() - begin:.1f} s", style="dim")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m genarm_fast.demo", description="A real language model, steered by real reward models."
    )
    parser.add_argument("--prompt", action="append", help="ask this instead of the demo's prompts (may be repeated)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="folder for the plot (default: demo-output)"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON on stdout, the rest on stderr")
    parser.add_argument("--quick", action="store_true", help="one prompt, shorter answers, a coarser sweep")
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="also write demo.svg there, and the plot")
    return parser.parse_args(argv)
