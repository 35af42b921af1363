"""Guided decoding on a GPU, next to what it costs to read the base's weights once (W) and to Hugging Face.

    python benchmarks/gpu.py [--seconds 480] [--out FOLDER] [--only ROW ...]
    python benchmarks/gpu.py --dry                a trial at toy size, without a GPU
    python benchmarks/gpu.py --report RESULT.json table and picture of a result, again

`make bench-gpu` is the first, with ARGS for the rest. Correctness comes first, then rows in the order of their weight;
after each of them the JSON is on disk, so that what was measured stays when time runs out. No network. docs/gpu.md
explains the rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path

from gpu_bench.dry import interpreting, standing_in

RESULTS = Path(__file__).parent / "results"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="of all rows together (default: 480; 3600 if dry)")
    parser.add_argument("--out", type=Path, help="folder of the result (default: benchmarks/results; if dry a new one)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows by their names")
    parser.add_argument("--dry", action="store_true", help="toy sizes, interpreted, with stand-ins for a GPU")
    parser.add_argument("--report", type=Path, metavar="RESULT.json", help="write its table and picture beside it")
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)  # what nsys runs
    args = parser.parse_args()
    if args.seconds is None:
        args.seconds = 3600.0 if args.dry else 480.0
    if args.seconds <= 0:
        parser.error(f"--seconds {args.seconds:g}: expected a number above 0")
    if args.dry and args.out is not None and RESULTS.resolve() in (args.out.resolve(), *args.out.resolve().parents):
        parser.error(f"--out {args.out}: expected another folder than {RESULTS}, whose numbers are of real runs")
    return args


def report(path: Path) -> str:
    """Write the table and the picture beside a result; returns the table."""
    from gpu_bench.report import markdown, plot

    result = json.loads(path.read_text())
    text = markdown(result)
    path.with_suffix(".md").write_text(text)
    try:
        plot(result, path.with_suffix(".png"))
    except ImportError as error:  # where the GPU is; the result makes its picture elsewhere, with --report
        return f"{text}\nno picture: {error}\n"
    return text


def main() -> None:
    args = parsed()
    if args.report is not None:
        print(report(args.report))
        return
    if args.dry:
        interpreting()
    import torch
    from gpu_bench.machine import machine
    from gpu_bench.measure import Bench
    from gpu_bench.profile import profiled
    from gpu_bench.rows import ROWS
    from gpu_bench.schedule import run_all
    from gpu_bench.settings import DRY, REAL

    setting = DRY if args.dry else REAL
    if not args.dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: expected one, or --dry")
    names = [row.name for row in ROWS]
    if unknown := sorted(set(args.only or ()) - set(names)):
        raise SystemExit(f"--only {unknown[0]!r}: expected one of {', '.join(map(repr, names))}")
    warnings.filterwarnings("ignore", category=UserWarning, module="transformers")
    if args.profiled:
        profiled(Bench(setting))
        return
    about = machine(setting.device)
    folder = args.out or (Path(tempfile.mkdtemp(prefix="gpu-")) if args.dry else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    device = "dry" if args.dry else about["gpu"].lower().replace(" ", "-")
    path = folder / f"gpu-{device}-{about['date'][:16].replace(':', '')}.json"
    result = {"setting": setting.name, "budget_seconds": args.seconds, "machine": about}
    rows = [row for row in ROWS if args.only is None or row.name in args.only]
    with standing_in() if args.dry else nullcontext():
        run_all(rows, Bench(setting), result, path, args.seconds, say=lambda line: print(line, flush=True))
    print(report(path))
    print(path)
    if any("error" in row for row in result["rows"]):  # type: ignore[attr-defined]
        sys.exit(1)


if __name__ == "__main__":
    main()
