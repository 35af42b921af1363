"""CUDA: a stream for every model runner, graphs of work that repeats, and read-back through pinned memory."""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from genarm_fast.device.base import Device, T, WorkStream, out_of_memory, span

WARM_UP = 2  # calls of a shape before its capture, in which libraries make their plans and caches are allocated
SHORTEST = 128  # smallest KV bound; all are powers of two
# Share of a GPU's memory that caches leave free for activations and graphs: 4 of 80 GB. A forward of 4,096 tokens of an
# 8B model takes 1 GB.
LEFT_FREE = 0.05
MOST_GRAPHS = 64  # most graphs at a time, since each keeps its outputs in memory
POOL = 32  # size of the pool from which PyTorch gives out streams in turn
# Captures that may fail on a stream before it runs without graphs. A call that another thread makes on the device can
# end a capture that begins at the same moment.
TRIES = 2


class Cuda(Device):
    """CUDA device: work is queued, and the host goes on. Streams of other devices (an ARM on the CPU) block it."""

    lag = 1
    # Chunks of 4,096 tokens. With 512, a GPU mostly waits for weights, and a chunk takes as long as two or three steps
    # of an 8B model.
    prefill_factor = 8
    launches_to_capture = WARM_UP + 1

    def __init__(self) -> None:
        super().__init__()
        self.streams: list[torch.cuda.Stream] = []
        self.pools: dict[WorkStream, Any] = {}  # a memory pool for each stream, whose graphs never run at the same time
        self.calls: Counter[Any] = Counter()
        self.threads = threading.local()  # its `streams` are those on which the current thread has called `repeat`
        self.graphs: dict[Any, Graph] = {}
        self.failures: Counter[WorkStream] = Counter()  # captures that failed
        self.eager: set[WorkStream] = set()  # streams whose work can't be captured
        self.most_graphs = MOST_GRAPHS

    def stream(self, device: torch.device) -> WorkStream:
        if device.type != "cuda":
            return device
        for _ in range(POOL):
            if (stream := torch.cuda.Stream(device)) not in _living:
                break
        _living.add(stream)
        self.streams.append(stream)
        follow(stream)
        return stream

    def begin(self) -> None:
        for stream in self.streams:
            follow(stream)

    def launch(self, stream: WorkStream, name: str, function: Callable[..., T], *args: Any) -> T:
        with span(name), on(stream):
            return function(*args)

    def hand_over(self, tensors: Sequence[Tensor], source: WorkStream, target: WorkStream) -> list[Tensor]:
        if isinstance(target, torch.device):
            with on(source):
                return [tensor.to(target) for tensor in tensors]
        if isinstance(source, torch.device):
            return [self.upload(tensor, target) for tensor in tensors]
        target.wait_stream(source)
        if source.device == target.device:
            for tensor in tensors:
                tensor.record_stream(target)  # else its memory, once freed, could go to other work of `source` at once
            return list(tensors)
        with on(source), on(target):  # a copy between devices is ordered with both devices' current streams
            return [tensor.to(target.device, non_blocking=True) for tensor in tensors]

    def upload(self, tensor: Tensor, stream: WorkStream) -> Tensor:
        if isinstance(stream, torch.device):
            return tensor.to(stream)
        with on(stream):  # the allocator of pinned memory reuses it only after the copy
            # CUDA can't pin an expanded tensor, such as the positions of several rows that begin at one position.
            return tensor.contiguous().pin_memory().to(stream.device, non_blocking=True)

    def read(self, tensors: Sequence[Tensor], stream: WorkStream) -> Callable[[], list[Tensor]]:
        if isinstance(stream, torch.device):
            return super().read(tensors, stream)
        with span("read-back"), on(stream):
            host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
            done = torch.cuda.Event()
            done.record(stream)

        def result() -> list[Tensor]:
            done.synchronize()
            return host

        return result

    def repeat(self, stream: WorkStream, key: Any, function: Callable[..., T], *inputs: Tensor) -> T:
        key = (stream, key)
        graph = self.graphs.pop(key, None)
        if graph is None:
            self.calls[key] += 1
            known = self._known_here({stream, *getattr(key[1], "streams", ())})
            if self.calls[key] <= WARM_UP or not known or stream in self.eager or isinstance(stream, torch.device):
                return function(*inputs)
            # A pool dies with its last graph, so another one is made then. It is taken out during the capture, since a
            # pool in which a capture failed can't take another one.
            pool = self.pools.pop(stream, None) if any(stream == other for other, _ in self.graphs) else None
            pool = torch.cuda.graph_pool_handle() if pool is None else pool
            try:
                graph = Graph(stream, pool, function, inputs)
                self.pools[stream] = pool
            except RuntimeError as error:  # the work can't be captured, for example experts that count their rows
                if out_of_memory(error):
                    raise  # the engine then runs fewer sequences or fails; the next capture may have enough memory
                self.failures[stream] += 1
                if self.failures[stream] == TRIES:
                    said = f"a forward runs without a CUDA graph, since it can't be captured: {error}"
                    warnings.warn(said, stacklevel=2)
                    self.eager.add(stream)
                return function(*inputs)
            while len(self.graphs) >= self.most_graphs:  # no graph runs now, since a capture waits for the device
                del self.graphs[next(iter(self.graphs))]
        self.graphs[key] = graph  # the order of the dict is that of the latest use
        return graph(*inputs)

    def _known_here(self, streams: set[WorkStream]) -> bool:
        """Whether this thread has called `repeat` on all of these streams before. Notes that it has called it now.

        cuBLAS has a handle for each thread, and can't make one in a capture: "CUBLAS_STATUS_NOT_INITIALIZED". Threads
        take turns at the steps of an engine, so a thread may come after another one has done the warm-up.
        """
        own = vars(self.threads).setdefault("streams", set())
        known = streams <= own
        own |= streams
        return known

    def captures(self, streams: Sequence[WorkStream]) -> bool:
        on_one_gpu = (
            not any(isinstance(each, torch.device) for each in streams) and len({s.device for s in streams}) == 1
        )
        return on_one_gpu and not self.eager.intersection(streams)

    def forget(self, stream: WorkStream) -> None:
        for kept in (self.graphs, self.calls):
            for key in [key for key in kept if stream == key[0] or stream in getattr(key[1], "streams", ())]:
                del kept[key]

    @contextmanager
    def keeping_graphs(self) -> Iterator[None]:
        self.most_graphs = sys.maxsize
        try:
            yield
        finally:
            self.most_graphs = max(MOST_GRAPHS, len(self.graphs))

    def shape(self, rows: int, slots: int, kv_bound: int, capacity: int) -> tuple[int, int]:
        return min(power_of_two(rows), slots), min(power_of_two(max(kv_bound, SHORTEST)), capacity)

    def spare_bytes(self, device: torch.device) -> float:
        if device.type != "cuda":
            return super().spare_bytes(device)
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached - LEFT_FREE * total

    def mark(self, stream: WorkStream) -> Any:
        if isinstance(stream, torch.device):
            return super().mark(stream)
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def elapsed(self, start: Any, end: Any) -> float:
        if isinstance(end, float):  # a mark of a stream that blocks is a number
            return super().elapsed(start, end)
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def finish(self) -> None:
        for stream in self.streams:
            stream.synchronize()


class Graph:
    """A CUDA graph of a function's kernels, replayed with new inputs.

    Outputs are copies, since the next launch overwrites the originals. But an input that the function returns is the
    graph's own tensor: the next launch goes on from its contents if the caller passes it back.
    """

    def __init__(self, stream: WorkStream, pool: Any, function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        # The tensor that was copied to each input last; None if the graph has overwritten that input since.
        self.given: list[Tensor | None] = [None] * len(inputs)
        self.graph = torch.cuda.CUDAGraph()
        self.outputs: tuple[Tensor, ...] = captured(self.graph, stream, pool, function, self.inputs)
        own = {id(tensor) for tensor in self.inputs}
        self.written = {id(output) for output in self.outputs if id(output) in own}

    def __call__(self, *inputs: Tensor) -> Any:
        for i, (own, given, before) in enumerate(zip(self.inputs, inputs, self.given)):
            if given is not own and given is not before:
                own.copy_(given)
                self.given[i] = None if id(own) in self.written else given
        self.graph.replay()
        return tuple(output if id(output) in self.written else output.clone() for output in self.outputs)


_capturing = threading.Lock()  # two captures at once break each other, since each begins by waiting for the device
# Streams of all engines. No two engines share a stream, so that a capture does not take in another engine's work.
_living: WeakSet[torch.cuda.Stream] = WeakSet()
_origins: dict[torch.device, torch.cuda.Stream] = {}
_failed: list[Any] = []


def origin_of(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which all captures of a device begin, and which has no other work.

    Captured work runs on forks of it. The reason: when a graph is destroyed, PyTorch (2.12, 2.13: its issue 193402)
    frees cuBLAS's memory of the stream on which the capture began, although matrix products in other graphs still use
    that memory.
    """
    if device not in _origins:
        # Another priority has another pool, so that this stream is none of the runners' 32 streams.
        _origins[device] = torch.cuda.Stream(device, priority=-1)
    return _origins[device]


def captured(
    graph: Any, stream: torch.cuda.Stream, pool: Any, function: Callable[..., T], inputs: Sequence[Tensor]
) -> T:
    """Call function(*inputs), and capture its work on `stream` and its forks in the graph. Returns its result.

    Raises any error that the function raises.
    """
    raised: list[BaseException] = []
    with _capturing, on(stream):  # `on` restores the current stream, which a capture that fails at its end does not
        origin = origin_of(stream.device)
        try:
            # Other threads may use the device meanwhile; with "global" their calls would make the capture fail.
            with torch.cuda.graph(graph, pool=pool, stream=origin, capture_error_mode="thread_local"):
                try:
                    stream.wait_stream(origin)
                    with on(stream):
                        outputs = function(*inputs)
                    origin.wait_stream(stream)
                except BaseException as error:
                    raised.append(error)
                    raise
        except BaseException:
            abandon(graph, stream.device, pool)
            if raised:  # raise the function's error: the capture's end failed too, since forks had not been joined
                raise raised.pop() from None
            raise
    return outputs


def abandon(graph: Any, device: torch.device, pool: Any) -> None:
    """Tell PyTorch's allocator that a capture into this pool has failed, which it does not notice (2.11 to 2.13).

    Otherwise the allocator would believe that the capture goes on: tensors with `record_stream` would never be freed,
    and `empty_cache` would do nothing.
    """
    graph.reset()
    _failed.append(graph)  # never freed, since the allocator of pinned memory still asks this graph for its state
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError:  # the allocator had noticed the end
        return
    torch._C._cuda_releasePool(device.index, pool)


def on(stream: WorkStream) -> AbstractContextManager[Any]:
    """Return a context manager that makes a stream the current one; for a torch device it does nothing."""
    return nullcontext() if isinstance(stream, torch.device) else torch.cuda.stream(stream)


def follow(stream: torch.cuda.Stream) -> None:
    """Let a stream wait for its device's current stream, which may still be loading or changing weights."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below this number."""
    return 1 << (number - 1).bit_length()
