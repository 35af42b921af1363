"""Where work runs: streams, hand-overs between them, read-back, shapes that repeat.

The engine says what runs on which stream, and which tensors cross from one to another; nothing else orders its work.
`Device` is the CPU, where a launch is a call; `cuda.Cuda` is the asynchronous one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import profiler

HOST = torch.device("cpu")
T = TypeVar("T")
WorkStream = Any  # a torch.device, or a torch.cuda.Stream

NVTX = ("NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID", "GENARM_FAST_NVTX")  # set by Nsight, or by hand
annotate: Any = None
if any(map(os.environ.get, NVTX)):  # its import takes 35 ms
    with suppress(ImportError):
        import nvtx

        annotate = nvtx.annotate
NSIGHT = annotate is not None
_nothing = nullcontext()


def span(name: str) -> AbstractContextManager[Any]:
    """A range that profilers show: torch.profiler's if one is on, NVTX's under Nsight.

    Without either it takes 1 to 2 us; `record_function` takes 77 us where no profiler is on (2 cores of a shared EPYC).
    """
    if profiler._is_profiler_enabled:  # process-wide, unlike `torch.autograd._profiler_enabled`
        return profiler.record_function(name)
    return annotate(name) if NSIGHT else _nothing


class Device:
    """Every piece of work runs when it is launched. A stream is no more than the device that it is on."""

    lag = 0  # steps that the host may read behind
    prefill_factor = 1  # times as many tokens of prompts in a chunk as beside sequences that generate
    launches_to_capture = 0  # of one key, until `repeat` has a graph of it; 0: it never has

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def stream(self, device: torch.device) -> WorkStream:
        """A queue of work."""
        return device

    def launch(self, stream: WorkStream, name: str, function: Callable[..., T], *args: Any) -> T:
        """function(*args) with what it asks of the device put on `stream`, in a profiler's range `name`."""
        with span(name):
            return function(*args)

    def hand_over(self, tensors: Sequence[Tensor], source: WorkStream, target: WorkStream) -> list[Tensor]:
        """Give tensors of one stream to another, which waits for all that the first was given before this."""
        return list(tensors) if source == target else [tensor.to(target) for tensor in tensors]

    def upload(self, tensor: Tensor, stream: WorkStream) -> Tensor:
        """A tensor of the host's, for work on `stream`."""
        return tensor if stream == HOST else tensor.to(stream)

    def read(self, tensors: Sequence[Tensor], stream: WorkStream) -> Callable[[], list[Tensor]]:
        """Begin to copy tensors of `stream` to the host; call the result to wait for them."""
        return lambda: list(tensors)

    def repeat(self, stream: WorkStream, key: Any, function: Callable[..., T], *inputs: Tensor) -> T:
        """function(*inputs), launched on `stream`. With one key, only the numbers in the inputs ever differ.

        An input that the function returns is one that it writes to, and what it leaves there is the next call's, if
        that gives it back. All others stay as they are, as long as anybody may give them again.
        """
        return function(*inputs)

    def captures(self, streams: Sequence[WorkStream]) -> bool:
        """Whether `repeat` may have graphs of work that begins and ends on the first one and visits the others."""
        return False

    def shape(self, rows: int, slots: int, kv_bound: int, capacity: int) -> tuple[int, int]:
        """Rows, at most `slots`, and KV bound, at most `capacity`, raised so that few shapes exist where that pays."""
        return rows, kv_bound

    def forget(self, stream: WorkStream) -> None:
        """Drop what `repeat` keeps of a stream, since it holds addresses of memory that is freed.

        That is what has the stream in its key, and what names it among the `streams` of its key.
        """

    @contextmanager
    def keeping_graphs(self) -> Iterator[None]:
        """Graphs of what repeats inside are kept for good: requests will need them."""
        yield

    def spare_bytes(self, device: torch.device) -> float:
        """Memory of a device that caches may take; what forwards need for themselves is left out. inf: not known."""
        return math.inf

    def mark(self, stream: WorkStream) -> Any:
        """A point in time, when all that `stream` was given before is done."""
        return self.clock()

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds between two marks; waits for the second."""
        return end - start

    def begin(self) -> None:
        """Let all streams wait for what others gave to their devices: a run begins on streams of another one."""

    def finish(self) -> None:
        """Wait for all streams: a run ends."""


@contextmanager
def no_autocast() -> Iterator[None]:
    """A caller's own, as of a training loop, would give activations other dtypes than weights and caches have."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def on_host() -> AbstractContextManager[Any]:
    """Tensors without a device are the host's inside, whatever `torch.set_default_device` says to the caller's thread.

    A default device is a mode on a stack, whose length costs 0.1 us to ask for; which device it is, 3 us.
    """
    other = torch._C._len_torch_function_stack() > 0 and torch.get_default_device().type != "cpu"
    return HOST if other else nullcontext()


def out_of_memory(error: Exception) -> bool:
    """Whether PyTorch raised it for lack of memory; on the CPU only its words say so."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    )
