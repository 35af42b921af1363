"""CUDA: a stream for every model runner, graphs of what repeats, read-back through pinned memory."""

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

WARM_UP = 2  # calls of a shape before it is captured: libraries make their plans, caches are allocated
SHORTEST = 128  # KV bounds are powers of two from here on
LEFT_FREE = 0.05  # of a GPU's memory, for activations and graphs: of 80 GB 4, where 4,096 tokens of an 8B model take 1
MOST_GRAPHS = 64  # each keeps its outputs
POOL = 32  # streams that PyTorch gives in turn
TRIES = 2  # of captures on a stream: what another thread asks of the device may end one that begins at the same time


class Cuda(Device):
    """Work is queued and the host goes on. Streams of other devices than CUDA's (an ARM on the CPU) block."""

    lag = 1
    prefill_factor = 8  # 4,096 tokens: 512 leave a GPU waiting for weights, and take two or three steps of an 8B model
    launches_to_capture = WARM_UP + 1

    def __init__(self) -> None:
        super().__init__()
        self.streams: list[torch.cuda.Stream] = []
        self.pools: dict[WorkStream, Any] = {}  # of memory, for graphs of one stream: they follow one another
        self.calls: Counter[Any] = Counter()
        self.threads = threading.local()  # `streams`: those on which this thread has run what repeats
        self.graphs: dict[Any, Graph] = {}
        self.failures: Counter[WorkStream] = Counter()  # of captures
        self.eager: set[WorkStream] = set()  # what cannot be captured
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
                tensor.record_stream(target)  # freed early, its memory would go to other work of `source` at once
            return list(tensors)
        with on(source), on(target):  # a copy between devices is ordered with the current streams of both
            return [tensor.to(target.device, non_blocking=True) for tensor in tensors]

    def upload(self, tensor: Tensor, stream: WorkStream) -> Tensor:
        if isinstance(stream, torch.device):
            return tensor.to(stream)
        with on(stream):  # pinned memory is not used again before the copy is over: its allocator sees to that
            # CUDA pins no expanded tensor, such as the positions of several rows that begin alike.
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
            # Taken out meanwhile, since one in which a capture failed takes no other. A pool dies with its last graph.
            pool = self.pools.pop(stream, None) if any(stream == other for other, _ in self.graphs) else None
            pool = torch.cuda.graph_pool_handle() if pool is None else pool
            try:
                graph = Graph(stream, pool, function, inputs)
                self.pools[stream] = pool
            except RuntimeError as error:  # experts that count their rows, say
                if out_of_memory(error):
                    raise  # the engine runs fewer sequences, or fails; the next capture may have room
                self.failures[stream] += 1
                if self.failures[stream] == TRIES:
                    said = f"a forward runs without a CUDA graph, since it can't be captured: {error}"
                    warnings.warn(said, stacklevel=2)
                    self.eager.add(stream)
                return function(*inputs)
            while len(self.graphs) >= self.most_graphs:  # none of them runs: a capture waits for the device
                del self.graphs[next(iter(self.graphs))]
        self.graphs[key] = graph  # the last one used comes last
        return graph(*inputs)

    def _known_here(self, streams: set[WorkStream]) -> bool:
        """Whether this thread has run something on all of these streams before; from now on it has.

        cuBLAS has a handle for each thread, and makes none in a capture: "CUBLAS_STATUS_NOT_INITIALIZED". Threads take
        turns at the steps of an engine, so one may come when another has warmed up.
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
        if isinstance(end, float):  # of a stream that blocks
            return super().elapsed(start, end)
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def finish(self) -> None:
        for stream in self.streams:
            stream.synchronize()


class Graph:
    """A function's kernels, launched as one. What it returns is a copy, since the next launch overwrites the original;
    but an input that it returns is its own one, from which the next launch goes on if it is given back."""

    def __init__(self, stream: WorkStream, pool: Any, function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        self.given: list[Tensor | None] = [None] * len(inputs)  # what was copied to them last, if it still stands there
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


_capturing = threading.Lock()  # two at once break each other: each begins by waiting for the device
_living: WeakSet[torch.cuda.Stream] = WeakSet()  # of all engines: what one launches, no capture of another's may take
_origins: dict[torch.device, torch.cuda.Stream] = {}
_failed: list[Any] = []


def origin_of(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all captures of a device begin, and which has no other work.

    What is captured is work of forks of it. For when a graph is destroyed, PyTorch (2.12, 2.13: its issue 193402) frees
    cuBLAS's memory of the stream that the capture began on, with which products in other graphs go on.
    """
    if device not in _origins:
        _origins[device] = torch.cuda.Stream(device, priority=-1)  # the others come from a pool of 32, again and again
    return _origins[device]


def captured(
    graph: Any, stream: torch.cuda.Stream, pool: Any, function: Callable[..., T], inputs: Sequence[Tensor]
) -> T:
    """function(*inputs), whose work on `stream` and its forks becomes the graph's. Raises what the function raises."""
    raised: list[BaseException] = []
    with _capturing, on(stream):  # afterwards the current one again, as it is not where the end of a capture fails
        origin = origin_of(stream.device)
        try:
            # Other threads may go on: "global" would fail at what they ask of the device meanwhile.
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
            if raised:  # ending such a capture failed too, as streams had not come back to the origin
                raise raised.pop() from None
            raise
    return outputs


def abandon(graph: Any, device: torch.device, pool: Any) -> None:
    """Tell PyTorch's allocator that a capture into this pool is over, which it does not notice (2.11 to 2.13).

    It would take every later moment for one within a capture: what `record_stream` keeps would never be freed, and
    `empty_cache` would do nothing.
    """
    graph.reset()
    _failed.append(graph)  # the allocator of pinned memory goes on asking it
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError:  # it was over
        return
    torch._C._cuda_releasePool(device.index, pool)


def on(stream: WorkStream) -> AbstractContextManager[Any]:
    """Make it the current one."""
    return nullcontext() if isinstance(stream, torch.device) else torch.cuda.stream(stream)


def follow(stream: torch.cuda.Stream) -> None:
    """Wait for the current one, which may still be loading weights, or changing them."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))


def power_of_two(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()
