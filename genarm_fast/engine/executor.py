"""The model runners and the device: forwards of all members, and what crosses between their streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from genarm_fast.device import device_for
from genarm_fast.device.base import WorkStream
from genarm_fast.engine.model_runner import ModelRunner, in_one_forward, padded
from genarm_fast.engine.sequence import Sequence
from genarm_fast.models.member import Member

T = TypeVar("T")


class Executor:
    """Runs members, each on the stream of its runner; the main stream samples and accepts.

    groups[g]: indices of the members that runner g hosts. timed: whether forwards are measured. spent[g]: marks around
    the latest forward of runner g.
    """

    def __init__(self, members: list[Member], draft_model: int | None) -> None:
        self.members, self.draft_model = members, draft_model
        target = members if draft_model is None else members[:draft_model]
        self.groups = in_one_forward(target)
        if draft_model is not None:
            self.groups.append([draft_model])
        devices = [member.device for member in members]
        self.device = device_for(devices)
        self.main: WorkStream = self.device.stream(devices[0])
        self.runners = [ModelRunner([members[i] for i in group], self.device) for group in self.groups]
        self._place = {i: (g, lane) for g, group in enumerate(self.groups) for lane, i in enumerate(group)}
        self.timed = False
        self._captured: dict[int, tuple[int, Tensor]] = {}
        # A graph is work of the main stream, also what it gives to forks of the others. So it waits for what the others
        # were given before, such as prompts, and they wait for it: a next prompt may come to a slot that it writes.
        self._working: set[WorkStream] = set()  # streams with work that the main one has not waited for
        self._behind: set[WorkStream] = set()  # streams whose next work has to wait for a graph
        self.spent: dict[int, tuple[Any, Any]] = {}

    def by_runner(self, members: Iterable[int]) -> dict[int, list[int]]:
        """These members by the runner that hosts them."""
        groups: dict[int, list[int]] = {}
        for member in members:
            groups.setdefault(self._place[member][0], []).append(member)
        return groups

    def lanes(self, members: Iterable[int]) -> list[int]:
        """Lanes of members in their runner."""
        return [self._place[member][1] for member in members]

    def label(self, members: list[int]) -> str:
        """What a profiler calls a forward of these members."""
        names = ("base" if m == 0 else "draft_model" if m == self.draft_model else f"arm[{m - 1}]" for m in members)
        return "+".join(names) + ".forward"

    def upload(self, tensor: Tensor) -> Tensor:
        """A tensor of the host's, for the main stream."""
        return self.device.upload(tensor, self.main)

    def read(self, tensors: list[Tensor], stream: WorkStream | None = None) -> Callable[[], list[Tensor]]:
        """Begin to copy tensors of the main stream, or of `stream`, to the host; call the result to wait for them."""
        return self.device.read(tensors, self.main if stream is None else stream)

    def launch(self, stream: WorkStream, name: str, function: Callable[..., T], *args: Any) -> T:
        """function(*args), with what it asks of the device on `stream`."""
        self._order(stream)
        return self.device.launch(stream, name, function, *args)

    def forward(
        self, members: list[int], tokens: list[Tensor], positions: Tensor, slots: list[int], kv_bound: int
    ) -> list[Tensor]:
        """Launch members of one runner on tokens, in pieces [L, R, n], at positions [L, R, q], all on its stream.

        Returns the logits [R, q, V] of each on that stream. Launch all forwards of a step, then `collect` the logits,
        so that the main stream waits for none of them before the others run.
        """
        g, lanes = self._place[members[0]][0], self.lanes(members)
        runner = self.runners[g]

        def forward() -> tuple[Tensor, ...]:
            inputs = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=-1)
            if g in self._captured:
                bound, rows = self._captured[g]
                return runner.logits(bound, lanes, inputs, positions, rows)
            return runner.forward(inputs, positions, slots, kv_bound, lanes)

        start = self.device.mark(runner.stream) if self.timed else None
        logits = self.launch(runner.stream, self.label(members), forward)
        if start is not None:
            self.spent[g] = start, self.device.mark(runner.stream)
        return list(logits)

    def repeat(self, key: Any, streams: tuple[WorkStream, ...], function: Callable[..., T], *inputs: Tensor) -> T:
        """`Device.repeat` on the main stream, of work that visits these streams."""
        for stream in self._working.intersection(streams):
            self.hand_over([], stream, self.main)
        out = self.device.repeat(self.main, key, function, *inputs)
        self._behind.update(streams)
        return out

    @contextmanager
    def captured(self, caches: dict[int, tuple[int, Tensor]]) -> Iterator[None]:
        """Forwards inside are parts of one graph: of each runner the KV bound, and rows of its cache, int64 [L·R]."""
        timed, self.timed, self._captured = self.timed, False, caches
        try:
            yield
        finally:
            self.timed, self._captured = timed, {}

    def hand_over(self, tensors: list[Tensor], source: WorkStream, target: WorkStream) -> list[Tensor]:
        """Give tensors of one stream to another."""
        if not self._captured:
            (self._working if target == self.main else self._behind).discard(source if target == self.main else target)
        return self.device.hand_over(tensors, source, target)

    def collect(self, members: list[int], logits: list[Tensor]) -> dict[int, Tensor]:
        """Logits of a forward of these members, for use on the main stream, by member."""
        g = self._place[members[0]][0]
        return dict(zip(members, self.hand_over(logits, self.runners[g].stream, self.main)))

    def stream_of(self, members: list[int]) -> WorkStream:
        """The stream of the runner that hosts these members."""
        return self.runners[self._place[members[0]][0]].stream

    def prefill(self, sequences: list[Sequence], members: list[int], start: int, width: int) -> None:
        """Write `width` tokens of each sequence from position `start` on into the caches of these members."""
        for g, own in self.by_runner(members).items():
            tokens = [[_piece(sequence, m, start, width) for sequence in sequences] for m in own]
            positions = torch.arange(start, start + width).expand(len(own), len(sequences), width)
            slots = [sequence.slot for sequence in sequences]
            inputs = (torch.tensor(tokens), positions, slots, start + width, self.lanes(own))
            self.launch(self.runners[g].stream, "prefill", self.runners[g].prefill, *inputs)
        for sequence in sequences:
            for m in members:
                sequence.cached[m] = min(start + width, sequence.position(m))

    def copy(self, source: int, target: int, length: int, members: list[int]) -> None:
        """Give slot `target` the first `length` tokens of slot `source`, for these members."""
        for g, own in self.by_runner(members).items():
            runner = self.runners[g]
            self.launch(runner.stream, "prefill", runner.copy, source, target, length, self.lanes(own))

    def clear(self, slot: int) -> None:
        """Forget a slot whose numbers may not be finite."""
        for runner in self.runners:
            if runner.slots:
                self.launch(runner.stream, "prefill", runner.clear, slot)

    def refresh(self) -> None:
        """A run begins: notice what was done to weights since the last one."""
        self.device.begin()
        for runner in self.runners:
            self._order(runner.stream)
            runner.refresh()

    def _order(self, stream: WorkStream) -> None:
        """The stream gets work: after the graphs that use what is its own."""
        if stream != self.main and not self._captured:
            if stream in self._behind:
                self.hand_over([], self.main, stream)
            self._working.add(stream)


def _piece(sequence: Sequence, member: int, start: int, width: int) -> list[int]:
    end = min(start + width, sequence.position(member))
    return padded(sequence.text_of(member, start, end), width)
