"""Drafters: they propose tokens, and all of these are verified. So a wrong draft costs time, and nothing else.

The engine uses drafters through the protocols of this file alone, and drafters use the engine in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from genarm_fast.device.base import Device, WorkStream


class SequenceBatch(Protocol):
    """The part of a step's batch that drafters read; see `genarm_fast.engine.batch.Batch`."""

    sequences: Any
    active: tuple[int, ...]
    slots: Any
    epochs: list[int]
    vocab_size: int

    def tokens(self, members: list[int]) -> Tensor: ...

    def positions(self, members: list[int]) -> Tensor: ...

    def response_positions(self, width: int) -> Tensor: ...

    def texts(self) -> tuple[Tensor, Tensor]: ...

    def kv_bound(self, members: list[int], width: int) -> int: ...

    def sampling(self, stream: WorkStream) -> Any: ...


class DraftExecutor(Protocol):
    """The part of the executor that drafters use; see `genarm_fast.engine.executor.Executor`."""

    device: Device
    main: WorkStream
    draft_model: int | None
    forward_marks: dict[int, tuple[Any, Any]]

    def stream_of(self, members: list[int]) -> WorkStream: ...

    def forward(
        self, members: list[int], tokens: list[Tensor], positions: Tensor, slots: list[int], kv_bound: int
    ) -> list[Tensor]: ...

    def collect(self, members: list[int], logits: list[Tensor]) -> dict[int, Tensor]: ...

    def hand_over(self, tensors: list[Tensor], source: WorkStream, target: WorkStream) -> list[Tensor]: ...

    def upload(self, tensor: Tensor) -> Tensor: ...

    def prefill(self, sequences: Any, members: list[int], start: int, width: int) -> None: ...


class Drafts:
    """The drafts of a step. Sequence r has the first counts[r] tokens of row r of `tensor`; -1 stands for no draft.

    tensor: int64 [R, k] on `stream`. on_main: the same tensor for use on the main stream, after `target_logits`. read:
    returns the tensor, or a wider one, on the host. marks: times before and after the drafter's forwards, for which the
    step had to wait. steps: number of these forwards. fed: tokens that the drafter itself has fed in this step. It is
    k, the last token and all drafts but the last one; for a drafter that runs ahead it is k + 1.
    """

    def __init__(
        self,
        tensor: Tensor,
        counts: Sequence[int],
        stream: WorkStream,
        read: Callable[[], Tensor] | None = None,
        *,
        marks: tuple[Any, Any] | None = None,
        steps: int = 0,
    ) -> None:
        self.tensor, self.counts, self.stream, self.read = tensor[:, : max(counts)], list(counts), stream, read
        self.marks, self.steps, self.fed, self.on_main = marks, steps, 0, self.tensor
        self.members: tuple[int, ...] = ()  # members that the drafter runs

    @property
    def width(self) -> int:
        """The most drafts of any sequence."""
        return max(self.counts)

    @cached_property
    def host(self) -> list[list[int]]:
        """All tokens that the drafter drew, on the host. Waits for a device that drafts."""
        assert self.read is not None
        return self.read().tolist()

    @cached_property
    def tokens(self) -> list[list[int]]:
        """The drafts of each sequence."""
        return [[token for token in line[:count] if token >= 0] for line, count in zip(self.host, self.counts)]


def no_drafts(rows: int, stream: WorkStream) -> Drafts:
    """Return drafts in which none of `rows` sequences has any."""
    nothing = torch.empty(rows, 0, dtype=torch.int64)
    return Drafts(nothing, [0] * rows, stream, lambda: nothing)


class CapturedDrafts(NamedTuple):
    """Drafts within a graph.

    block: int64 [R, k] on `stream`, the tokens that the other members feed. rest: launches the drafter's last forwards,
    after the verification by the others is launched. It returns two things for the main stream: the block, with -1 for
    no draft, and its members' logits at the drafted positions, [R, k + 1, V] by member.
    """

    block: Tensor
    stream: WorkStream
    rest: Callable[[], tuple[Tensor, dict[int, Tensor]]]


class Drafter(Protocol):
    """A drafter: it proposes tokens for the sequences of a batch.

    names: names by which users choose it. members: indices of the members that it runs; () if it reads text alone.
    reads_texts: whether a batch needs `texts` on the device when this drafter is part of a graph.
    """

    names: tuple[str, ...]
    members: tuple[int, ...]
    reads_texts: bool

    def propose(self, batch: SequenceBatch, most: list[int]) -> Drafts:
        """Return at most most[r] drafts for sequence r. Random draws use the noise of their targets."""

    def target_logits(self, drafts: Drafts) -> dict[int, Tensor]:
        """Return its members' logits at the drafted positions, [R, q, V] by member, for the main stream.

        The result is {} without members. The engine calls this after it has launched the verification by the others.
        Drafts of another stream get their `on_main`, `read` and `fed`, which is q, here.
        """

    def captures(self, sequences: list[Any], before: tuple[int, ...] | None) -> bool:
        """Whether the drafter may draft for these sequences as part of a graph.

        before: members that drafted in the step in flight; () if none did, None if no step is in flight.
        """

    def capture(self, batch: SequenceBatch, k: int) -> CapturedDrafts:
        """Draft k tokens of every sequence by work of the device alone, for a graph. The drafter feeds all of them."""

    def accepted(self, drafts: Drafts, accepted: list[int], drafting: float, verifying: float) -> None:
        """Learn how many drafts of each sequence were right, and the seconds that drafting and verifying took."""

    def forget(self) -> None:
        """Drop all state of earlier steps, because the sequences have left or a step failed."""

    def guess(self, sequences: list[Any], most: int) -> list[list[int]] | None:
        """Return, for shadow evaluation, the drafts that it would propose from the text; None if it needs a model."""

    def shadow(self, batch: SequenceBatch, logits: dict[int, Tensor]) -> Callable[[], tuple[list[list[int]], float]]:
        """Draw, for shadow evaluation, the next token that its members would propose from logits of this step.

        Call the result for the tokens of each sequence, and the seconds that drafting them would have taken.
        """
