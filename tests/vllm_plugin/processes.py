"""The processes that a test's engine or server started: what they were doing when it hung, and their end."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

PASSING = ("resource_tracker", "compile_worker")  # of Python and of Inductor: end with the process that made them


def started(pid: int | None = None) -> list[psutil.Process]:
    """All that descend from this process, or from that of `pid`, and do something of their own."""
    with suppress(psutil.NoSuchProcess):
        return [each for each in psutil.Process(pid).children(recursive=True) if _working(each)]
    return []


def _working(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        line = " ".join(process.cmdline())
        return process.status() != psutil.STATUS_ZOMBIE and not any(name in line for name in PASSING)
    return False


def show_stacks(processes: list[psutil.Process]) -> None:
    """Have each write the stacks of its threads to its stderr, see site/sitecustomize.py."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            print(f"-- {process.pid}: {' '.join(process.cmdline())[-200:]}", file=sys.stderr, flush=True)
            # To what handles it: elsewhere it would be the end before the stacks of the others are there.
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
