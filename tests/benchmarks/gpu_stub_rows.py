"""Rows that fail, hang or die, for test_gpu_schedule.py. They replace the rows of gpu_bench.rows."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from types import SimpleNamespace

from gpu_bench.schedule import Row, Skip


def machine(bench):
    return {
        "gpu": "none",
        "date": "2026-11-29T10:00",
        "commit": "abc",
        "torch": "2",
        "triton": "3",
        "transformers": "5",
    }


def good(bench):
    return {"ms": 1.0, "process": os.getpid()}


def raises(bench):
    bench.keep({"lines": [1.5]})
    bench.so_far = {"lines": [1.5]}
    raise ZeroDivisionError("by nought")


def spoils(bench):
    leaves_badly(bench)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def lacks(bench):
    raise Skip("no such model")


def dies(bench):
    bench.keep({"lines": [2.5]})
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(bench):
    """Hang like a call into CUDA, which no signal handler interrupts."""
    bench.keep({"lines": [3.5]})
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(600)


def long(bench):
    bench.keep({"lines": [4.5]})
    time.sleep(600)


def leaves_badly(bench):
    def leave():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bench.leave = leave
    return {"ms": 2.0}


@contextmanager
def benching(name):
    yield SimpleNamespace(so_far={}, leave=lambda: None, keep=lambda so_far: None, setting=name)


MACHINE = Row("machine", machine, 1)
ROWS = [
    Row("good", good, 0.1, "first"),
    Row("raises", raises, 0.1, "first"),
    Row("after an error", good, 0.1, "first"),
    Row("spoils", spoils, 0.1, "first"),
    Row("after a spoilt one", good, 0.1, "first"),
    Row("lacks", lacks, 0.1, "first"),
    Row("dies", dies, 0.1, "first"),
    Row("after a death", good, 0.1, "first"),
    Row("leaves badly", leaves_badly, 0.1, "second"),
    Row("another group", good, 0.1, "third"),
    Row("hangs", hangs, 0.1, "third", most=0.5),
    Row("long", long, 0.1, "third", most=0.5),
    Row("last", good, 0.1, "third"),
    Row("does not fit", good, 1e6, "third"),
    Row("fits", good, 0.1, "third"),
    Row("for ever", long, 0.1, "third", most=600),
]
