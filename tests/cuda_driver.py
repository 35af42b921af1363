"""torch.cuda without a GPU: streams and events only write to a log, and graphs replay on CPU tensors."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from itertools import count, pairwise
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from doubles import storage, tensors_in
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from genarm_fast.device import cuda
from genarm_fast.device.cuda import Cuda
from genarm_fast.kernels import _native


class Gpu(NamedTuple):
    """A stand-in for a CUDA `torch.device`."""

    index: int = 0
    type: str = "cuda"


class Log(list[tuple[Any, ...]]):
    """Calls in order. An entry begins with the kind of the call and ends with the stream that was current."""

    def __init__(self) -> None:
        super().__init__()
        self.current: list[Any] = ["default"]

    def add(self, *what: Any) -> None:
        self.append((*what, self.current[-1]))

    def of(self, *kinds: str) -> list[tuple[Any, ...]]:
        return [entry for entry in self if entry[0] in kinds]

    def captures(self) -> list[tuple[str, Any, Any]]:
        """Return (graph, pool, stream that the captured work belongs to) of each capture."""
        entries = self.of("capture", "fork")
        return [(*entry[1:3], fork[1]) for entry, fork in pairwise(entries) if entry[0] == "capture"]


class FakeStream:
    """A stream. The log has an entry for each stream of priority 0; captures begin on streams of other priorities."""

    def __init__(self, log: Log, device: Any, priority: int = 0) -> None:
        self.log, self.device = log, device
        self.name = "origin" if priority else f"stream {len({id(entry[1]) for entry in log.of('stream')})}"
        if not priority:
            log.add("stream", self)

    def __repr__(self) -> str:
        return self.name

    def wait_stream(self, other: Any) -> None:
        forks = "origin" in (self.name, getattr(other, "name", ""))
        self.log.add("fork" if forks else "wait", self, other)

    def synchronize(self) -> None:
        self.log.add("synchronize", self)


class FakeEvent:
    def __init__(self, log: Log) -> None:
        self.log = log

    def record(self, stream: Any) -> None:
        self.log.add("record", self, stream)

    def synchronize(self) -> None:
        self.log.add("event", self)

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class Tape(TorchDispatchMode):
    """A record of operations and Triton interpreter launches, to be repeated on the same tensors.

    visited: the streams that were current during the recording.
    """

    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log
        self.operations: list[tuple[Any, ...]] = []
        self.visited: set[Any] = set()

    @contextmanager
    def recording(self):
        getitem = InterpretedFunction.__getitem__

        def recorded(kernel, grid):
            def launch(*args, **kwargs):
                def run():
                    with _disable_current_modes():  # a graph does not contain the interpreter's own work
                        getitem(kernel, grid)(*args, **kwargs)

                run()
                self.visited.add(self.log.current[-1])
                self.operations.append((run, (), {}, None))

            return launch

        with patch.object(InterpretedFunction, "__getitem__", recorded), self:
            yield

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.visited.add(self.log.current[-1])
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            known = {storage(tensor) for tensor in tensors_in([args, kwargs])}
            for mine, new in zip(tensors_in(out), tensors_in(func(*args, **kwargs))):
                if storage(mine) not in known:
                    mine.copy_(new)


class Memory:
    """A model of how PyTorch's allocator, 2.11 to 2.13, treats captures; `found` lists the errors it would raise.

    A pool dies with the last graph that was captured into it. A capture that fails goes on until code ends it by hand,
    and its pool accepts no further capture. Destroying a graph frees cuBLAS's memory of the stream that its capture
    began on.
    """

    def __init__(self) -> None:
        self.graphs: Counter[Any] = Counter()  # number of live graphs in each pool
        self.captures: set[Any] = set()  # pools of captures under way
        self.spoilt: set[Any] = set()  # pools of captures that failed
        self.visited: dict[str, set[Any]] = {}  # streams with work in each graph
        self.found: list[str] = []
        self.capturing = False

    def begin(self, pool: Any) -> None:
        wrong = {
            "operation not permitted when stream is capturing": self.capturing,
            "beginAllocateToPool: already recording to mempool_id": pool in self.captures | self.spoilt,
            "it->second->use_count > 0 INTERNAL ASSERT FAILED": pool in self.graphs and not self.graphs[pool],
        }
        for words in (words for words, so in wrong.items() if so):
            self.found.append(words)
            raise RuntimeError(words)
        self.graphs[pool] += 1
        self.captures.add(pool)

    def end(self, device: Any, pool: Any) -> None:
        if pool not in self.captures:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.captures.remove(pool)

    def release(self, device: Any, pool: Any) -> None:
        self.graphs[pool] -= 1

    def destroy(self, graph: str, origin: Any, pool: Any) -> None:
        self.release(None, pool)
        del self.visited[graph]
        if any(origin in visited for visited in self.visited.values()):
            self.found.append(f"products of other graphs go on with memory of {origin}, which is freed")


class FakeGraph:
    def __init__(self, log: Log, memory: Memory) -> None:
        self.log, self.memory, self.tape = log, memory, Tape(log)
        self.name = f"graph {len(log)}"
        self.captured: tuple[Any, Any] | None = None  # the stream that the capture began on, and the pool

    @contextmanager
    def capture(self, origin: Any, pool: Any, allowed: bool):
        memory = self.memory
        memory.begin(pool)
        self.log.add("capture", self.name, pool)
        memory.capturing = True
        try:
            with self.tape.recording():
                yield
        except BaseException:  # streams forked from the origin have not joined it again
            memory.spoilt.add(pool)
            raise RuntimeError("CUDA error: capturing stream has unjoined work") from None
        finally:
            memory.capturing = False
        if not allowed:
            memory.spoilt.add(pool)
            raise RuntimeError("operation not permitted when stream is capturing")
        memory.end(None, pool)
        self.captured = origin, pool
        memory.visited[self.name] = self.tape.visited

    def replay(self) -> None:
        self.log.add("replay", self.name)
        self.tape.replay()

    def reset(self) -> None:
        if self.captured is not None:
            self.memory.destroy(self.name, *self.captured)
        self.captured = None

    def __del__(self) -> None:
        self.reset()


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or refuse an expanded one, as CUDA does: several of its elements share one place in memory."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
        raise RuntimeError("cannot pin an expanded tensor: more than one element refers to a single memory location")
    return tensor


@contextmanager
def cuda_driver(*, captures: bool = True):
    """Replace torch.cuda by stand-ins that work on CPU tensors and yield their log. Disable the C++ core: no dispatch
    mode sees its work."""
    log, memory, pools = Log(), Memory(), count()

    @contextmanager
    def stream(new):
        before = list(log.current)
        log.current.append(new)
        try:
            yield
        finally:
            log.current[:] = before

    @contextmanager
    def capture(graph, *, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        log.current.append(stream)
        with graph.capture(stream, pool, captures):
            yield
        log.current.pop()  # PyTorch skips this line when the end of the capture fails

    empty = torch.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_origins", {})
        patch.setattr(cuda, "_failed", [])
        patch.setattr(torch._C, "_cuda_endAllocateToPool", memory.end, raising=False)
        patch.setattr(torch._C, "_cuda_releasePool", memory.release, raising=False)
        patch.setattr(torch.cuda, "Stream", lambda device, priority=0: FakeStream(log, device, priority))
        patch.setattr(torch.cuda, "Event", lambda **_: FakeEvent(log))
        patch.setattr(torch.cuda, "current_stream", lambda _: "default")
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(log, memory))
        patch.setattr(torch.cuda, "graph", capture)
        patch.setattr(torch.cuda, "mem_get_info", lambda _: (60 << 30, 80 << 30))
        patch.setattr(torch.cuda, "memory_reserved", lambda _: 15 << 30)
        patch.setattr(torch.cuda, "memory_allocated", lambda _: 9 << 30)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
        patch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
        patch.setattr(torch.Tensor, "pin_memory", pinned)
        patch.setattr(torch.Tensor, "record_stream", lambda self, stream: log.add("keep", storage(self), stream))
        patch.setattr(_native, "core", None)
        yield log
        assert not memory.captures, "a capture is over, and PyTorch's allocator does not know"
        assert memory.found == []


class OnCpuTensors(Cuda):
    """The CUDA device class, with CPU tensors as if they were on a GPU."""

    def stream(self, device):
        made = super().stream(Gpu())
        made.device = device
        return made
