"""Stand-ins for a device that the host runs ahead of: they do all work at once, on the CPU, and record it."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from genarm_fast import GenARM
from genarm_fast.device.base import Device
from genarm_fast.device.cuda import Cuda
from genarm_fast.engine.engine import Engine
from genarm_fast.kernels import _native


class Lagging(Device):
    """The CPU device with CUDA's shapes and lag. All work takes no time.

    whole_steps: whether plain steps may run as one launch.
    """

    lag = 1
    shape = Cuda.shape

    def __init__(self, *, whole_steps: bool = True) -> None:
        super().__init__(clock=lambda: 0.0)
        self.whole_steps = whole_steps

    def captures(self, streams: Any) -> bool:
        return self.whole_steps

    def read(self, tensors: Any, stream: Any) -> Any:
        """Copy the tensors now: the next step may write to them before the caller waits for the result."""
        with _disable_current_modes():
            copies = [tensor.clone() for tensor in tensors]
        return lambda: copies


HOST = "host"


class Recorder(Lagging):
    """A device that orders accesses by vector clocks and finds unordered accesses to the same storage.

    Work on one stream is in order. A stream is ordered after work of another stream only by a hand-over, or if the host
    read the result before it launched. `without`: index of the hand-over to leave out.
    """

    def __init__(self, without: int | None = None, *, whole_steps: bool = True) -> None:
        super().__init__(whole_steps=whole_steps)
        self.without = without
        self.hand_overs = 0
        self.clocks: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.current = HOST
        self.streams = self.graphs = 0
        self.writes: dict[int, tuple[str, int]] = {}  # last write to each storage: its stream, and that stream's time
        self.reads: dict[int, dict[str, int]] = defaultdict(dict)
        self.home: dict[int, str] = {}  # storage allocated during the recording: the stream that owns its memory
        self.recorded: set[tuple[int, str]] = set()
        self.kept: list[Any] = []  # keeps storages alive, so that no new one gets the address of an old one
        self.launches: list[tuple[str, str, dict[str, int], int]] = []  # name, stream, its clock before, its end
        self.found: list[str] = []
        self.inside: dict[str, str] = {}  # each stream that the graph visits: its name inside the graph

    def stream(self, device: torch.device) -> str:
        self.streams += 1
        return f"stream {self.streams - 1}"

    def repeat(self, stream, key, function, *inputs):
        """Call the function as the replay of a graph: all its work belongs to `stream`.

        Hand-overs inside the graph order its parts, on streams that exist only inside it. They order nothing that the
        real streams run before or after the graph.
        """
        visited = [each for each in getattr(key, "streams", ()) if each != stream]
        self.graphs += bool(visited)
        self.inside = {each: f"{each} in graph {self.graphs}" for each in visited}
        # The graph keeps its inputs alive.
        self.recorded |= {(storage(tensor), each) for tensor in inputs for each in visited}
        try:
            return function(*inputs)
        finally:
            for each in self.inside.values():
                self.behind(stream, each)
            self.inside = {}

    def launch(self, stream, name, function, *args):
        stream = self.inside.get(stream, stream)
        self.behind(stream, HOST)
        before = dict(self.clocks[stream])
        with self.on(stream):
            result = function(*args)
        self.launches.append((name, stream, before, self.clocks[stream][stream]))
        return result

    def hand_over(self, tensors, source, target):
        self.hand_overs += 1
        source, target = (self.inside.get(each, each) for each in (source, target))
        if self.hand_overs - 1 != self.without:
            self.behind(target, source)
        self.recorded |= {(storage(tensor), real(target)) for tensor in tensors}
        return list(tensors)

    def upload(self, tensor, stream):
        with _disable_current_modes():  # the host's own work is in no stream, wherever the call happens
            copy = tensor.clone()
        with self.on(stream):
            self.access(copy, "upload", True)
        return copy

    def read(self, tensors, stream):
        with self.on(stream):
            copies = [tensor.clone() for tensor in tensors]
        then = dict(self.clocks[stream])

        def result():
            for name, time in then.items():
                self.clocks[HOST][name] = max(self.clocks[HOST][name], time)
            return copies

        return result

    def behind(self, stream: str, other: str) -> None:
        mine = self.clocks[stream]
        for name, time in self.clocks[other].items():
            mine[name] = max(mine[name], time)

    @contextmanager
    def on(self, stream: str):
        before, self.current = self.current, stream
        self.behind(stream, HOST)
        yield
        self.current = before

    def access(self, tensor: torch.Tensor, what: str, write: bool) -> None:
        key, stream = storage(tensor), self.current
        clock = self.clocks[stream]
        self.kept.append(tensor.untyped_storage())
        others = dict(self.reads[key]) if write else {}
        if key in self.writes:
            name, time = self.writes[key]
            others[name] = max(others.get(name, 0), time)
        for name, time in others.items():
            if name != stream and clock[name] < time:
                self.found.append(f"{what} on {stream} is not ordered after {name}")
        own = real(stream)
        if stream != HOST and self.home.get(key, own) not in (own, HOST) and (key, own) not in self.recorded:
            self.found.append(f"{what} on {stream}: its memory belongs to {self.home[key]}, which may reuse it")
        clock[stream] += 1
        if write:
            self.home.setdefault(key, own)
            self.writes[key] = stream, clock[stream]
            self.reads[key] = {}
        else:
            self.reads[key][stream] = clock[stream]


def real(stream: str) -> str:
    """Return the real stream behind a stream inside a graph: memory allocated inside is freed in the real stream's
    order."""
    return stream.partition(" in graph")[0]


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Accesses(TorchDispatchMode):
    """A dispatch mode that tells a recorder what each operation reads and writes."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        schema = func._schema
        given = dict(zip((a.name for a in schema.arguments), args)) | kwargs
        written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        inputs = {storage(tensor) for tensor in tensors_in(given)}
        made = [tensor for tensor in tensors_in(out) if storage(tensor) not in inputs]
        if not written and not made and any(each.alias_info is not None for each in schema.returns):
            return out  # a view
        for name, value in given.items():
            for tensor in tensors_in(value):
                self.recorder.access(tensor, str(func), name in written)
        for tensor in made:
            self.recorder.access(tensor, str(func), True)
        return out


def tensors_in(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@contextmanager
def engines_on(device: Device):
    """Run engines made inside on `device`, without the C++ core, whose operations no dispatch mode sees.

    Models get a separate engine inside the context and lose it at the end.
    """
    engines: dict[int, Engine] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("genarm_fast.engine.executor.device_for", lambda _: device)
        own = property(lambda self: engines.get(id(self)), lambda self, engine: engines.update({id(self): engine}))
        patch.setattr(GenARM, "_engine", own, raising=False)
        patch.setattr(_native, "core", None)
        yield device
