"""torch.cuda without a GPU: streams and events that only keep a log, graphs that replay on CPU tensors."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from doubles import storage, tensors_in
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from genarm_fast.device.cuda import Cuda
from genarm_fast.kernels import _native


class Log(list[tuple[Any, ...]]):
    """Calls in order; the first entry of each says what it was, the last the stream that was current."""

    def __init__(self) -> None:
        super().__init__()
        self.current: list[Any] = ["default"]

    def add(self, *what: Any) -> None:
        self.append((*what, self.current[-1]))

    def of(self, *kinds: str) -> list[tuple[Any, ...]]:
        return [entry for entry in self if entry[0] in kinds]


class FakeStream:
    def __init__(self, log: Log, device: Any) -> None:
        self.log, self.device = log, device
        self.name = f"stream {len({id(entry[1]) for entry in log.of('stream')})}"
        log.add("stream", self)

    def __repr__(self) -> str:
        return self.name

    def wait_stream(self, other: Any) -> None:
        self.log.add("wait", self, other)

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
    """Operations, to be done again on the same tensors; kernels of Triton's interpreter as well."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []

    @contextmanager
    def recording(self):
        getitem = InterpretedFunction.__getitem__

        def recorded(kernel, grid):
            def launch(*args, **kwargs):
                def run():
                    with _disable_current_modes():  # what the interpreter does on its way is none of the graph's
                        getitem(kernel, grid)(*args, **kwargs)

                run()
                self.operations.append((run, (), {}, None))

            return launch

        with patch.object(InterpretedFunction, "__getitem__", recorded), self:
            yield

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            known = {storage(tensor) for tensor in tensors_in([args, kwargs])}
            for mine, new in zip(tensors_in(out), tensors_in(func(*args, **kwargs))):
                if storage(mine) not in known:
                    mine.copy_(new)


class FakeGraph:
    def __init__(self, log: Log) -> None:
        self.log, self.tape = log, Tape()

    def replay(self) -> None:
        self.log.add("replay", self)
        self.tape.replay()


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """As CUDA has it: an expanded tensor, several of whose elements lie in one place, is refused."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
        raise RuntimeError("cannot pin an expanded tensor: more than one element refers to a single memory location")
    return tensor


@contextmanager
def cuda_driver(*, captures: bool = True):
    """torch.cuda with a log, for CPU tensors, and without the C++ core, which no dispatch mode sees."""
    log = Log()

    @contextmanager
    def stream(new):
        log.current.append(new)
        yield
        log.current.pop()

    @contextmanager
    def capture(graph, *, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        log.current.append(stream)
        log.add("capture", graph, pool)
        with graph.tape.recording():
            yield
        log.current.pop()
        if not captures:
            raise RuntimeError("operation not permitted when stream is capturing")

    empty = torch.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", lambda device: FakeStream(log, device))
        patch.setattr(torch.cuda, "Event", lambda **_: FakeEvent(log))
        patch.setattr(torch.cuda, "current_stream", lambda _: "default")
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(log))
        patch.setattr(torch.cuda, "graph", capture)
        patch.setattr(torch.cuda, "mem_get_info", lambda _: (60 << 30, 80 << 30))
        patch.setattr(torch.cuda, "memory_reserved", lambda _: 15 << 30)
        patch.setattr(torch.cuda, "memory_allocated", lambda _: 9 << 30)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: len(log))
        patch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
        patch.setattr(torch.Tensor, "pin_memory", pinned)
        patch.setattr(torch.Tensor, "record_stream", lambda self, stream: log.add("keep", storage(self), stream))
        patch.setattr(_native, "core", None)
        yield log


class OnCpuTensors(Cuda):
    """The CUDA device, made to believe that CPU tensors are on it."""

    def stream(self, device):
        made = super().stream(SimpleNamespace(type="cuda"))
        made.device = device
        return made
