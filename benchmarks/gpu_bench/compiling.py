"""Entry points of the benchmark's other processes: one compiles the kernels of a job, one decodes under nsys."""

from __future__ import annotations

import torch

from .profile import profiled
from .rows import ROWS, benching
from .schedule import attempt


def compile_job(name: str, setting: str) -> int:
    """Run the rows of a job with shallow models. Print the traceback of each row that fails; return 1 if one did."""
    rows, failed = {row.name: row for row in ROWS}, 0
    with benching(setting) as bench:
        job = next(job for job in bench.setting.jobs if job.name == name)
        bench.setting = bench.setting.shallow(job.changes)
        for row in job.rows:
            entry = attempt(rows[row], bench, 600)
            bench.leave()
            if "traceback" in entry:
                failed = 1
                print(row, entry["traceback"], flush=True)
    return failed


def profile_alone() -> int:
    with benching("real") as bench:
        profiled(bench)
        torch.cuda.synchronize()
    return 0
