"""Measures a batch job of a million short lines: its memory above the model's, and the time to its first answers.

    python benchmarks/million_lines.py [--lines 1000000] [--answers 2000] [--json FILE]

The model is a tiny random one with an ARM, so most of the time goes to reading, checking and tokenising. The job is
stopped after --answers answers: the memory that it holds does not grow with their number.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from result_files import peak_resident
from soak import tiny_model

from genarm_fast import SamplingParams, jobs

MIB = 1 << 20


class Enough(Exception):
    """The job has given as many answers as were asked for."""


def measure(lines: int, answers: int) -> dict[str, Any]:
    """Run the job and return its times in seconds and its memory in MiB. Raises the errors of a job."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder), 16)
        model.generate(["the cat"] * 16, max_new_tokens=8)  # the memory of a first call counts as the model's
        path = Path(folder, "in.jsonl")
        with open(path, "w", encoding="utf-8") as file:
            for i in range(lines):
                file.write(
                    json.dumps({"prompt": f"question {i} of a million", "id": f"q{i}", "temperature": 0.5}) + "\n"
                )
        before = forget_peak()
        start, cpu = time.perf_counter(), time.process_time()  # CPU time leaves out the other processes of the machine
        found: dict[str, float] = {}
        count = 0

        def answered(number: int, tokens: int) -> None:
            nonlocal count
            count += number
            if not found.get("first_answer_s"):
                found["first_answer_s"] = time.perf_counter() - start
                found["first_answer_cpu_s"] = time.process_time() - cpu
            if count >= answers:
                raise Enough

        requests = jobs.read_requests(path, SamplingParams(max_new_tokens=8, seed=1), arms=len(model.arms))
        found["lines_checked_s"] = time.perf_counter() - start
        found["lines_checked_cpu_s"] = time.process_time() - cpu
        output = Path(folder, "out.jsonl")
        try:
            with jobs.ResultsFile(output, requests, "setup") as results:
                jobs.run(model, requests, results, answered)
        except Enough:
            pass
        found["answers"], found["all_s"] = count, time.perf_counter() - start
        start = time.perf_counter()
        with jobs.ResultsFile(output, requests, "setup") as results:
            found["lines_found_again"] = len(results.answered)
        found["found_again_s"] = time.perf_counter() - start
        return {
            "lines": lines,
            **found,
            "peak_mib_above_model": (peak_resident() - before) / MIB,
            "model_mib": before / MIB,
        }


def forget_peak() -> int:
    """Reset the recorded peak of resident memory to its present size, and return that in bytes (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_resident()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--answers", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = measure(args.lines, args.answers)
    report = {name: round(value, 2) if isinstance(value, float) else value for name, value in report.items()}
    print(json.dumps(report | {"date": f"{date.today()}"}))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
