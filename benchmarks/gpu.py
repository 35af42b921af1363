"""Measure guided decoding on a GPU, beside the time to read the base's weights once (W) and beside Hugging Face.

    python benchmarks/gpu.py [--budget 480] [--out FOLDER] [--only ROW ...]
    python benchmarks/gpu.py --dry                run a trial at toy size, without a GPU
    python benchmarks/gpu.py --report RESULT.json write the table and the picture of a result again

`make bench-gpu ARGS="..."` runs the first command with the options in ARGS. The rows on correctness come first, then
the other rows in the order of their importance. The JSON file is written before and after each row, so measured numbers
stay if time runs out, a row fails or the run is killed. The file also names the rows that time was too short for. The
script needs no network. docs/gpu.md explains the rows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_bench.clone import importable
from gpu_bench.dry import interpreting

BEGAN = time.monotonic()  # before the large imports, which take seconds of the budget
RESULTS = Path(__file__).parent / "results"
SLOWER = 8.0  # A trial's rows take up to this many times their estimates, as the interpreter does.


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="seconds that the whole run may take (default: 480; --dry: 3600)",
    )
    parser.add_argument("--out", type=Path, help="folder of the result (default: benchmarks/results; --dry: a new one)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names of the rows to run (default: all)")
    parser.add_argument("--dry", action="store_true", help="run a trial at toy size, without a GPU")
    parser.add_argument("--report", type=Path, metavar="RESULT.json", help="write the result's table and picture again")
    # Tests pass a module with rows of their own. The first row starts processes with --compile, and nsys one with
    # --profiled.
    parser.add_argument("--rows", default="gpu_bench.rows", help=argparse.SUPPRESS)
    parser.add_argument("--compile", metavar="JOB", help=argparse.SUPPRESS)
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.budget is None:
        args.budget = 3600.0 if args.dry else 480.0
    if args.budget <= 0:
        parser.error(f"--budget {args.budget:g}: expected a number above 0")
    if args.dry and args.out is not None and RESULTS.resolve() in (args.out.resolve(), *args.out.resolve().parents):
        parser.error(f"--out {args.out}: expected another folder than {RESULTS}, whose numbers are of real runs")
    return args


def report(path: Path) -> None:
    """Write the table of a result beside it and print it; then draw the picture, which takes longer."""
    from gpu_bench.report import markdown, plot

    result = json.loads(path.read_text())
    text = markdown(result)
    path.with_suffix(".md").write_text(text)
    print(text, path, sep="\n", flush=True)
    try:
        plot(result, path.with_suffix(".png"))
    except ImportError as error:  # a GPU machine may lack matplotlib; --report draws the picture on another machine
        print(f"no picture: {error}")


def measure(args: argparse.Namespace) -> Path:
    """Run the rows in separate processes, and return the path of the result."""
    from gpu_bench.schedule import RESERVE, run_all
    from gpu_bench.workers import Workers, interrupted

    signal.signal(signal.SIGTERM, interrupted)
    with Workers(args.rows, "dry" if args.dry else "real") as workers:
        source: Any = importlib.import_module(args.rows)  # imported while the workers start
        names = [row.name for row in source.ROWS]
        if unknown := sorted(set(args.only or ()) - set(names)):
            raise SystemExit(f"--only {unknown[0]!r}: expected one of {', '.join(map(repr, names))}")
        about = workers.run(source.MACHINE, 60, lambda so_far: None)
        if "error" in about:
            raise SystemExit(f"no CUDA device that works: expected one, or --dry: {about['error']}")
        folder = args.out or (Path(tempfile.mkdtemp(prefix="gpu-")) if args.dry else RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        device = "dry" if args.dry else about["gpu"].lower().replace(" ", "-")
        path = folder / f"gpu-{device}-{about['date'][:16].replace(':', '')}.json"
        result = {"setting": "dry" if args.dry else "real", "budget_seconds": args.budget, "machine": about}
        rows = [row for row in source.ROWS if args.only is None or row.name in args.only]
        try:
            run_all(
                rows, workers, result, path, BEGAN + args.budget - RESERVE, slower=SLOWER if args.dry else 1.0,
                say=lambda line: print(line, flush=True),
            )  # fmt: skip
        except KeyboardInterrupt:
            print("interrupted: the table has the rows before", file=sys.stderr)
        return path


def main() -> None:
    args = parsed()
    if args.report is not None:
        report(args.report)
        return
    if args.dry:
        interpreting()
    importable()
    # Without a network, each request to the hub would wait for its time-out.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.profiled or args.compile:
        from gpu_bench.compiling import compile_job, profile_alone

        sys.exit(compile_job(args.compile, "dry" if args.dry else "real") if args.compile else profile_alone())
    path = measure(args)
    report(path)
    result = json.loads(path.read_text())
    if "running" in result or any("error" in row for row in result["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
