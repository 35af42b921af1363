"""Compares guided decoding with Hugging Face's unguided base: tables of README.md and docs/performance.md, and a plot.

    OMP_NUM_THREADS=1 python benchmarks/guidance.py measure [--rounds 3]    takes 20 minutes of a core, then writes too
    python benchmarks/guidance.py write [FILE]                              from FILE, or from the newest result file

A result file is benchmarks/results/guidance-<date>-<machine>-<instruction set>.json. It has the reports of `decode.py`
and `speculation.py`. `write` puts the file's table between two marks in README.md. Between two marks in
docs/performance.md it puts the tables of the newest files of other instruction sets. No figure there is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decode import HUGGING_FACE
from registry import RESULTS
from result_files import fill, machine, name_of

from genarm_fast import demo

HERE = Path(__file__).parent
README, PAGE, PLOT = (HERE.parent / name for name in ("README.md", "docs/performance.md", "docs/img/guidance.png"))
BLOCK = "guidance"  # name of the marks in README.md and docs/performance.md
WEIGHTS = {"bfloat16": None, "exact": "exact"}  # how this library holds the weights: title -> --quantization
COLUMNS = [(weights, batch) for weights in WEIGHTS for batch in (1, 8)]
PLAIN = {  # variant of decode.py -> row of the table
    "base alone": "base alone, here",
    "1 LoRA ARM, lanes": "1 LoRA ARM, in one forward with the base",
    "2 LoRA ARMs, lanes": "2 LoRA ARMs",
    "1 ARM, naive loop over two models": "1 ARM, naive loop over two models",
}
DRAFTED = {  # part of speculation.py, from which the contender "auto" is taken -> row of the table
    "pair": "1 small ARM (0.07 of the base's cost), drafting for the base",
    "lookup": "1 LoRA ARM, n-gram drafts, text that repeats its prompt",
}
FLOAT32 = "the same base in float32, Hugging Face"
OTHERS = ["1 LoRA ARM, own forward", "2 LoRA ARMs, own forwards"]
LOOPS = ["naive loop over two models", "base alone, Hugging Face assisted", "base alone, Hugging Face prompt lookup"]


def commands(base: str, arms: Sequence[str], rounds: int) -> dict[str, list[str]]:
    """Return the arguments of python for each run, by the name of the run."""
    found = {}
    for weights, quantization in WEIGHTS.items():
        held = [] if quantization is None else ["--quantization", quantization]
        own = ["--tokens", "16", "--rounds", str(rounds), "--dtype", "bf16", "--batch", "1", "8"]
        skipped = [*OTHERS, *(["1 ARM, naive loop over two models"] if held else [])]
        found[f"decode, {weights}"] = ["decode.py", base, *arms, *own, *held, "--skip", *skipped, "--json"]
        for part in DRAFTED:
            own = ["--tokens", "40", "--rounds", str(rounds), "--k", "3", "--json", "/dev/stdout"]
            found[f"{part}, {weights}"] = ["speculation.py", part, *own, *held, "--skip", *LOOPS]
    own = ["--tokens", "16", "--rounds", str(rounds), "--dtype", "fp32", "--batch", "1", "8"]
    found["decode, float32"] = ["decode.py", base, *arms, *own, "--skip", *PLAIN, *OTHERS, "--json"]
    return found


def measure(rounds: int) -> dict[str, Any]:
    """Run all `commands` one after another, each in a process of its own, and return a result file's contents."""
    arms = [str(demo.arm(name)) for name in ("positive", "concise")]
    found: dict[str, Any] = {"machine": machine(), "rounds": rounds, "runs": {}}
    for name, (script, *rest) in commands(str(demo.base()), arms, rounds).items():
        print(f"{name}: {script}", file=sys.stderr, flush=True)
        command = [sys.executable, HERE / script, *rest]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found["runs"][name], _ = json.JSONDecoder().raw_decode(output.lstrip())
    return found


def ratios(found: Mapping[str, Any]) -> dict[str, dict[tuple[str, int], float]]:
    """Return how many times as fast as Hugging Face's unguided base each row is, by row, weights and batch."""
    titles = (FLOAT32, *PLAIN.values(), *DRAFTED.values())
    rows: dict[str, dict[tuple[str, int], float]] = {title: {} for title in titles}
    speeds = {
        (name, line["batch"]): line["tokens/s"]
        for name in ("bfloat16", "float32")
        for line in found["runs"][f"decode, {name}"]["results"]
        if line["variant"] == HUGGING_FACE
    }
    for batch in (1, 8):  # the only ratio between two processes; all others are within one process
        rows[FLOAT32]["bfloat16", batch] = speeds["float32", batch] / speeds["bfloat16", batch]
    for weights in WEIGHTS:
        for line in found["runs"][f"decode, {weights}"]["results"]:
            if line["variant"] in PLAIN:
                rows[PLAIN[line["variant"]]][weights, line["batch"]] = line["ratio"]
        for part, title in DRAFTED.items():
            for line in found["runs"][f"{part}, {weights}"]["lines"]:
                if line["contender"] == "auto":
                    rows[title][weights, line["batch"]] = line["x base alone, Hugging Face"]
    return rows


def table(found: Mapping[str, Any]) -> str:
    """Return the ratios as a Markdown table, with a line about the machine above it."""
    about, rows = found["machine"], ratios(found)
    where = (
        f"{about['cores']} cores of an {about['device']} with {about['capability']}, one thread, load {about['load']}"
    )
    lines = [
        f"{about['date']}, {where}; medians of CPU time, {found['rounds']} round(s):\n",
        "| times as fast as Hugging Face's base alone | "
        + " | ".join(f"{weights}, batch {batch}" for weights, batch in COLUMNS)
        + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for title, row in rows.items():
        cells = ("" if key not in row else f"{row[key]:.2g}" if row[key] < 1 else f"{row[key]:.1f}" for key in COLUMNS)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Draw the table, with a group of bars for each row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = ratios(found)
    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    height = 0.8 / len(COLUMNS)
    for i, (key, colour) in enumerate(zip(COLUMNS, ("#4878a8", "#9fbfdc", "#c85200", "#f0a978"))):
        places = [(place + i * height, row[key]) for place, row in enumerate(rows.values()) if key in row]
        bars = axis.barh(*zip(*places), height=height, color=colour, label=f"{key[0]}, batch {key[1]}")
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    axis.set_yticks([place + 1.5 * height for place in range(len(rows))], rows)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set(xlabel=f"times as fast as {HUGGING_FACE}")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def newest() -> dict[str, Any]:
    """Return the contents of the newest result file. Raises FileNotFoundError if there is none."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("guidance-*.json")]
    if not found:
        raise FileNotFoundError(f"{RESULTS}/guidance-*.json: expected a result file; make one by `measure`")
    return max(found, key=_age)


def others(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the contents of the newest result file of each instruction set other than that of `found`."""
    files = sorted((json.loads(path.read_text()) for path in RESULTS.glob("guidance-*.json")), key=_age)
    sets = {each["machine"]["capability"]: each for each in files}
    return [each for name, each in sets.items() if name != found["machine"]["capability"]]


def _age(found: Mapping[str, Any]) -> tuple[str, str]:
    return found["machine"]["date"], found["machine"]["capability"]  # on the same day, AVX512 counts as newer than AVX2


def write(found: Mapping[str, Any]) -> None:
    README.write_text(fill(README.read_text(), {BLOCK: table(found)}))
    PAGE.write_text(fill(PAGE.read_text(), {BLOCK: "\n".join(map(table, others(found)))}))
    plot(found, PLOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["measure", "write"])
    parser.add_argument("file", type=Path, nargs="?", help="a result file")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.action == "measure":
        found = measure(args.rounds)
        about = found["machine"]
        name = f"guidance-{about['date']}-{name_of(about)}-{about['capability'].lower()}.json"
        (args.file or RESULTS / name).write_text(json.dumps(found, indent=1) + "\n")
    else:
        found = json.loads(args.file.read_text()) if args.file else newest()
    write(found)
    print(table(found))


if __name__ == "__main__":
    main()
