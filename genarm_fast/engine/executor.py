"""The executor: the model runners and the device. It launches all forwards, and orders work between streams."""

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
    """Runs the members, each on the stream of its runner. The main stream samples and accepts.

    groups[g]: indices of the members of runner g. timed: whether forwards are measured. forward_marks[g]: marks
    before and after the latest measured forward of runner g.
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
        self._runner_and_lane = {i: (g, lane) for g, group in enumerate(self.groups) for lane, i in enumerate(group)}
        self.timed = False
        self._captured_caches: dict[int, tuple[int, Tensor]] = {}
        # A graph runs on the main stream, with the parts that it forks to other streams. So it waits for earlier work
        # of the other streams, such as prompts. Their later work waits for it: a prompt may go to a slot it writes to.
        self._unawaited_streams: set[WorkStream] = set()  # streams with work that the main stream has not waited for
        self._streams_behind_graphs: set[WorkStream] = set()  # streams whose next work has to wait for a graph
        self.forward_marks: dict[int, tuple[Any, Any]] = {}

    def by_runner(self, members: Iterable[int]) -> dict[int, list[int]]:
        """Return these members grouped by their runner's index."""
        groups: dict[int, list[int]] = {}
        for member in members:
            groups.setdefault(self._runner_and_lane[member][0], []).append(member)
        return groups

    def lanes(self, members: Iterable[int]) -> list[int]:
        """Return each member's lane in its runner."""
        return [self._runner_and_lane[member][1] for member in members]

    def label(self, members: list[int]) -> str:
        """Return the name that a profiler shows for a forward of these members."""
        names = ("base" if m == 0 else "draft_model" if m == self.draft_model else f"arm[{m - 1}]" for m in members)
        return "+".join(names) + ".forward"

    def upload(self, tensor: Tensor) -> Tensor:
        """Copy a tensor from the host to the device, for use on the main stream."""
        return self.device.upload(tensor, self.main)

    def read(self, tensors: list[Tensor], stream: WorkStream | None = None) -> Callable[[], list[Tensor]]:
        """Begin to copy tensors of `stream`, by default the main one, to the host. Call the result to wait for them."""
        return self.device.read(tensors, self.main if stream is None else stream)

    def launch(self, stream: WorkStream, name: str, function: Callable[..., T], *args: Any) -> T:
        """Call function(*args) and return its result. Its device work goes to `stream`; `name` is for profilers."""
        self._order_after_graphs(stream)
        return self.device.launch(stream, name, function, *args)

    def forward(
        self, members: list[int], tokens: list[Tensor], positions: Tensor, slots: list[int], kv_bound: int
    ) -> list[Tensor]:
        """Launch a forward of members of one runner, on the runner's stream.

        tokens: pieces [L, R, n] that are joined to [L, R, q]. positions: [L, R, q]. Both are on that stream.

        Returns each member's logits [R, q, V] on that stream. Launch all forwards of a step before you `collect` the
        logits: else the main stream waits for one forward before the others are launched.
        """
        g, lanes = self._runner_and_lane[members[0]][0], self.lanes(members)
        runner = self.runners[g]

        def forward() -> tuple[Tensor, ...]:
            inputs = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=-1)
            if g in self._captured_caches:
                bound, rows = self._captured_caches[g]
                return runner.logits(bound, lanes, inputs, positions, rows)
            return runner.forward(inputs, positions, slots, kv_bound, lanes)

        start = self.device.mark(runner.stream) if self.timed else None
        logits = self.launch(runner.stream, self.label(members), forward)
        if start is not None:
            self.forward_marks[g] = start, self.device.mark(runner.stream)
        return list(logits)

    def repeat(self, key: Any, streams: tuple[WorkStream, ...], function: Callable[..., T], *inputs: Tensor) -> T:
        """Call `Device.repeat` on the main stream, for work that uses these other streams too."""
        for stream in self._unawaited_streams.intersection(streams):
            self.hand_over([], stream, self.main)
        out = self.device.repeat(self.main, key, function, *inputs)
        self._streams_behind_graphs.update(streams)
        return out

    @contextmanager
    def capturing(self, caches: dict[int, tuple[int, Tensor]]) -> Iterator[None]:
        """Make forwards inside parts of one graph. caches[g]: KV bound and cache rows, int64 [L·R], of runner g."""
        timed, self.timed, self._captured_caches = self.timed, False, caches
        try:
            yield
        finally:
            self.timed, self._captured_caches = timed, {}

    def hand_over(self, tensors: list[Tensor], source: WorkStream, target: WorkStream) -> list[Tensor]:
        """Give tensors of one stream to another, which waits for all work that the first has so far."""
        if not self._captured_caches:
            if target == self.main:
                self._unawaited_streams.discard(source)
            else:
                self._streams_behind_graphs.discard(target)
        return self.device.hand_over(tensors, source, target)

    def collect(self, members: list[int], logits: list[Tensor]) -> dict[int, Tensor]:
        """Return the logits of a forward of these members, by member, for use on the main stream."""
        g = self._runner_and_lane[members[0]][0]
        return dict(zip(members, self.hand_over(logits, self.runners[g].stream, self.main)))

    def stream_of(self, members: list[int]) -> WorkStream:
        """Return the stream of these members' runner."""
        return self.runners[self._runner_and_lane[members[0]][0]].stream

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
        """Zero a slot in all caches, since its numbers may not be finite."""
        for runner in self.runners:
            if runner.slots:
                self.launch(runner.stream, "prefill", runner.clear, slot)

    def refresh(self) -> None:
        """Begin a run: notice changes that were made to weights since the last one."""
        self.device.begin()
        for runner in self.runners:
            self._order_after_graphs(runner.stream)
            runner.refresh()

    def _order_after_graphs(self, stream: WorkStream) -> None:
        """Note that a stream gets work, and let that work wait for graphs that use the stream's tensors."""
        if stream != self.main and not self._captured_caches:
            if stream in self._streams_behind_graphs:
                self.hand_over([], self.main, stream)
            self._unawaited_streams.add(stream)


def _piece(sequence: Sequence, member: int, start: int, width: int) -> list[int]:
    end = min(start + width, sequence.position(member))
    return padded(sequence.text_of(member, start, end), width)
