"""A trial without a GPU: Triton's kernels are interpreted, and stand-ins replace streams, graphs, events and memory.

The stand-ins come from the tests (tests/cuda_driver.py). With them, the engine's own CUDA device runs on CPU tensors. A
graph is a tape of the calls during its capture, which includes interpreted launches.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[2]


def interpreting() -> None:
    """Start this process again with TRITON_INTERPRET=1 if that is not set. Triton reads the variable at its import."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["GENARM_FAST_SELFCHECK"] = "never"  # takes a third of the time, and has its own tests
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


class Event:
    """A stand-in for a CUDA event. It records the host's time, since a launch returns after its work."""

    def __init__(self, **_: Any) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.time - self.time)


@contextmanager
def standing_in() -> Iterator[None]:
    """Replace torch.cuda by stand-ins that work on CPU tensors, so that the rows need no GPU."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from cuda_driver import OnCpuTensors, cuda_driver
    from doubles import engines_on

    from genarm_fast.kernels import _dispatch

    torch.set_num_threads(1)

    def resident() -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with ExitStack() as stack:
        stack.enter_context(cuda_driver())
        for target, name, stand_in in [
            (torch.cuda, "Event", Event),
            (torch.cuda, "current_stream", lambda *_: "default"),
            (torch.cuda, "synchronize", lambda *_: None),
            (torch.cuda, "empty_cache", lambda: None),
            (torch.cuda, "reset_peak_memory_stats", lambda: None),
            (torch.cuda, "max_memory_allocated", resident),
            (torch.cuda, "memory_allocated", resident),
            (_dispatch, "GPUS", ("cpu",)),
        ]:
            stack.enter_context(patch.object(target, name, stand_in))
        stack.enter_context(engines_on(OnCpuTensors()))
        yield
