"""Processes that a test's engine or server started: shows what they do when they hang, and ends them."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

# Helpers of Python and Inductor, which end with the process that made them.
PASSING = ("resource_tracker", "compile_worker")


def started(pid: int | None = None) -> list[psutil.Process]:
    """Return all descendants of this process, or of process `pid`, except Python's and Inductor's helpers."""
    with suppress(psutil.NoSuchProcess):
        return [each for each in psutil.Process(pid).children(recursive=True) if _working(each)]
    return []


def _working(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        line = " ".join(process.cmdline())
        return process.status() != psutil.STATUS_ZOMBIE and not any(name in line for name in PASSING)
    return False


def show_stacks(processes: list[psutil.Process]) -> None:
    """Make each process write the stacks of its threads to its stderr, see site/sitecustomize.py."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            print(f"-- {process.pid}: {' '.join(process.cmdline())[-200:]}", file=sys.stderr, flush=True)
            # Only to processes that handle the signal: it would end the others before their stacks are written.
            if int(_handled(process.pid), 16) >> (signal.SIGUSR1 - 1) & 1:
                process.send_signal(signal.SIGUSR1)
    time.sleep(1)


def _handled(pid: int) -> str:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return line.split()[1]
    return "0"


def end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
