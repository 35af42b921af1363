"""The device interface: streams, hand-overs between them, read-back, and graphs of work that repeats.

The engine decides on which stream work runs, and hands tensors over between streams; nothing else orders its work.
`Device` is the CPU, where a launch is a call. `cuda.Cuda` is the asynchronous device.
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
if any(map(os.environ.get, NVTX)):  # nvtx is imported only under Nsight, since the import takes 35 ms
    with suppress(ImportError):
        import nvtx

        annotate = nvtx.annotate
NSIGHT = annotate is not None
_nothing = nullcontext()


def span(name: str) -> AbstractContextManager[Any]:
    """Return a context manager for a range that profilers show: torch.profiler if it is on, NVTX under Nsight.

    Without either it takes 1 to 2 us; `record_function` takes 77 us if no profiler is on (2 cores of a shared EPYC).
    """
    if profiler._is_profiler_enabled:  # process-wide, unlike `torch.autograd._profiler_enabled`
        return profiler.record_function(name)
    return annotate(name) if NSIGHT else _nothing


class Device:
    """A synchronous device, such as the CPU: all work runs when it is launched. A stream is just a torch device."""

    lag = 0  # steps by which the host may read later than it launches
    prefill_factor = 1  # size of a chunk of prompts while no sequence generates, relative to the usual one
    launches_to_capture = 0  # calls of `repeat` with one key until it has a graph; 0 for a device without graphs

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def stream(self, device: torch.device) -> WorkStream:
        """Return a stream, a queue of work, on a torch device."""
        return device

    def launch(self, stream: WorkStream, name: str, function: Callable[..., T], *args: Any) -> T:
        """Call function(*args), with its device work on `stream`, in a profiler's range `name`. Returns its result."""
        with span(name):
            return function(*args)

    def hand_over(self, tensors: Sequence[Tensor], source: WorkStream, target: WorkStream) -> list[Tensor]:
        """Give tensors of one stream to another, which waits for all work that the first has so far."""
        return list(tensors) if source == target else [tensor.to(target) for tensor in tensors]

    def upload(self, tensor: Tensor, stream: WorkStream) -> Tensor:
        """Copy a tensor from the host, for work on `stream`."""
        return tensor if stream == HOST else tensor.to(stream)

    def read(self, tensors: Sequence[Tensor], stream: WorkStream) -> Callable[[], list[Tensor]]:
        """Begin to copy tensors of `stream` to the host. Call the result to wait for them."""
        return lambda: list(tensors)

    def repeat(self, stream: WorkStream, key: Any, function: Callable[..., T], *inputs: Tensor) -> T:
        """Call function(*inputs) on `stream` and return its result; a device may capture and replay it as a graph.

        All calls with one key may differ in the inputs' values alone. An input that the function returns is one that it
        writes to: the next call goes on from its contents if it passes that tensor again. The function does not change
        other inputs, and the caller does not change them while it may pass them again.
        """
        return function(*inputs)

    def captures(self, streams: Sequence[WorkStream]) -> bool:
        """Whether `repeat` can capture work that begins and ends on the first stream and uses the other ones."""
        return False

    def shape(self, rows: int, slots: int, kv_bound: int, capacity: int) -> tuple[int, int]:
        """Return rows and KV bound. A device with graphs raises them to few sizes, within `slots` and `capacity`."""
        return rows, kv_bound

    def forget(self, stream: WorkStream) -> None:
        """Drop the graphs that use a stream, since they hold addresses of memory that is freed.

        A graph uses the stream that `repeat` got, and all of its key's `streams`.
        """

    @contextmanager
    def keeping_graphs(self) -> Iterator[None]:
        """Keep all graphs that are captured in the block for good, since requests will need them."""
        yield

    def spare_bytes(self, device: torch.device) -> float:
        """Return the bytes of a device's memory that caches may take beside forwards; inf if unknown."""
        return math.inf

    def mark(self, stream: WorkStream) -> Any:
        """Return a mark: the time when all earlier work of `stream` is done."""
        return self.clock()

    def elapsed(self, start: Any, end: Any) -> float:
        """Return the seconds between two marks. Waits for the second one."""
        return end - start

    def begin(self) -> None:
        """Begin a run: let all streams wait for earlier work of the caller on their devices."""

    def finish(self) -> None:
        """Wait until all streams have done their work."""


@contextmanager
def no_autocast() -> Iterator[None]:
    """Turn off a caller's autocast, such as that of a training loop.

    It would give activations other dtypes than weights and caches have.
    """
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def on_host() -> AbstractContextManager[Any]:
    """Return a context manager in which new tensors are on the host, whatever `torch.set_default_device` has set.

    torch keeps a default device as a mode on a stack. To ask for the stack's length takes 0.1 us, for the device 3 us.
    """
    other = torch._C._len_torch_function_stack() > 0 and torch.get_default_device().type != "cpu"
    return HOST if other else nullcontext()


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that PyTorch ran out of memory. On the CPU only the error's text tells."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    )
