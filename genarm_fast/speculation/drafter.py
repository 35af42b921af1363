"""What a drafter is: it proposes tokens, and all of them are verified. So a wrong one costs time, and nothing else.

The engine knows drafters by the protocols of this page alone, and drafters know the engine likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from genarm_fast.device.base import Device, WorkStream


class SequenceBatch(Protocol):
    """What drafters read of the sequences of a step; see `genarm_fast.engine.batch.Batch`."""

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
    """What drafters may ask for; see `genarm_fast.engine.executor.Executor`."""

    device: Device
    main: WorkStream
    draft_model: int | None
    spent: dict[int, tuple[Any, Any]]

    def stream_of(self, members: list[int]) -> WorkStream: ...

    def forward(
        self, members: list[int], tokens: list[Tensor], positions: Tensor, slots: list[int], kv_bound: int
    ) -> list[Tensor]: ...

    def collect(self, members: list[int], logits: list[Tensor]) -> dict[int, Tensor]: ...

    def hand_over(self, tensors: list[Tensor], source: WorkStream, target: WorkStream) -> list[Tensor]: ...

    def upload(self, tensor: Tensor) -> Tensor: ...

    def prefill(self, sequences: Any, members: list[int], start: int, width: int) -> None: ...


class Drafts:
    """The drafts of a step: of sequence r the first counts[r] of `tensor`, int64 [R, k] on `stream`; -1 is none.

    on_main: the same for use on the main stream, once `target_logits` was called. read: gives the tensor, or a wider
    one, on the host. marks, steps: times around so many forwards of the drafter, for which the step had to wait. fed:
    how many tokens the drafter itself has fed in this step. The last token and all drafts but the last one are k; a
    drafter that runs ahead has fed k + 1.
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
        self.members: tuple[int, ...] = ()  # of the drafter, if it runs any

    @property
    def width(self) -> int:
        """The most drafts of any sequence."""
        return max(self.counts)

    @cached_property
    def host(self) -> list[list[int]]:
        """All that the drafter drew; waits for the device where it drafts."""
        assert self.read is not None
        return self.read().tolist()

    @cached_property
    def tokens(self) -> list[list[int]]:
        """The drafts of each sequence."""
        return [[token for token in line[:count] if token >= 0] for line, count in zip(self.host, self.counts)]


def no_drafts(rows: int, stream: WorkStream) -> Drafts:
    """None for any of `rows` sequences."""
    nothing = torch.empty(rows, 0, dtype=torch.int64)
    return Drafts(nothing, [0] * rows, stream, lambda: nothing)


class CapturedDrafts(NamedTuple):
    """Drafts within a graph: `block`, int64 [R, k] on `stream`, as others feed it.

    rest: launches what is left of the drafter's forwards, when all that others verify is launched. It returns for the
    main stream the block, with -1 where there is no draft, and what its members say of the drafted positions,
    [R, k + 1, V] by member.
    """

    block: Tensor
    stream: WorkStream
    rest: Callable[[], tuple[Tensor, dict[int, Tensor]]]


class Drafter(Protocol):
    """Proposes tokens for the sequences of a batch.

    names: what users call it. members: indices of the members that it runs, () where it reads text alone. reads_texts:
    whether a batch has to have `texts` for it in graphs.
    """

    names: tuple[str, ...]
    members: tuple[int, ...]
    reads_texts: bool

    def propose(self, batch: SequenceBatch, most: list[int]) -> Drafts:
        """At most most[r] drafts for sequence r, drawn with the noise of their targets where noise plays a part."""

    def target_logits(self, drafts: Drafts) -> dict[int, Tensor]:
        """What its members say of the drafted positions, [R, q, V] by member, for the main stream; {} without members.

        Called when all that others verify is launched. Drafts of another stream get their `on_main` and `read` here,
        and their `fed`, which is q.
        """

    def captures(self, sequences: list[Any], before: tuple[int, ...] | None) -> bool:
        """Whether it may draft for these sequences as part of a graph.

        before: members that drafted in the step that is in flight, () if none did; None where nothing is in flight.
        """

    def capture(self, batch: SequenceBatch, k: int) -> CapturedDrafts:
        """Draft k tokens of every sequence by work of the device alone, for a graph. All of them are fed."""

    def accepted(self, drafts: Drafts, accepted: list[int], drafting: float, verifying: float) -> None:
        """Learn how many drafts of each sequence were right, and the seconds that drafting and verifying took."""

    def forget(self) -> None:
        """Drop what is kept from one step to the next: the sequences have left, or a step failed."""

    def guess(self, sequences: list[Any], most: int) -> list[list[int]] | None:
        """For shadow evaluation: what it would propose from the text alone; None if that takes a model."""

    def shadow(self, batch: SequenceBatch, logits: dict[int, Tensor]) -> Callable[[], tuple[list[list[int]], float]]:
        """For shadow evaluation: the next token that its members would propose, given their logits at hand.

        Call the result for the tokens and the seconds that they would have taken.
        """
