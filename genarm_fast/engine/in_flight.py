"""A step that was launched, and that the host has not read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from genarm_fast.device.base import span
from genarm_fast.engine.batch import Batch
from genarm_fast.engine.executor import Executor
from genarm_fast.engine.sampler import HostSample
from genarm_fast.engine.sequence import Sequence
from genarm_fast.kernels import GuidedSample
from genarm_fast.speculation.drafter import Drafts
from genarm_fast.speculation.observations import Choice
from genarm_fast.speculation.policy import DraftPolicy
from genarm_fast.speculation.shadow import Judge


@dataclass
class InFlight:
    """What `Steps.finish` needs of a step.

    most: tokens that it may give each sequence. read: waits for the targets and for how many of them were accepted.
    epochs: of each sequence's weights, as the step was launched. judge: tells shadow evaluation what was accepted.
    logits: of the running members, by member, from which a bonus token may be drawn. policy: who chose the step, if the
    host went on meanwhile; sequences that came or left since may have another one.
    """

    batch: Batch
    choice: Choice
    most: int
    drafts: Drafts
    read: Callable[[], tuple[HostSample, list[int]]]
    sequences: list[Sequence]
    epochs: list[int]
    judge: Judge = lambda _: None
    logits: dict[int, Tensor] = field(default_factory=dict)
    policy: DraftPolicy | None = None
    advanced: list[Sequence] = field(default_factory=list)  # once it is finished; so are the next two
    right: list[int] = field(default_factory=list)  # accepted drafts of each sequence
    judged: list[int] = field(default_factory=list)  # drafts of each that count as tried; see `Steps.finish`


def in_flight(
    executor: Executor,
    batch: Batch,
    choice: Choice,
    most: int,
    drafts: Drafts,
    read: Callable[[], tuple[GuidedSample, Tensor]],
) -> InFlight:
    """A step that was launched now. read: waits for the targets, and for how many each sequence accepts, int64 [R]."""
    for sequence in batch.sequences:
        sequence.unread += most
    names = [executor.members[m].name for m in batch.active]

    def wait() -> tuple[HostSample, list[int]]:
        with span("read-back"):
            result, accepted = read()
        return HostSample(result, names, batch.active), accepted.tolist()

    return InFlight(batch, choice, most, drafts, wait, batch.sequences, list(batch.epochs))


def reading(executor: Executor, result: GuidedSample, counts: Tensor) -> Callable[[], tuple[GuidedSample, Tensor]]:
    """Begin to copy targets and counts of the main stream to the host; call the result to wait for them."""
    fields = {name: value for name, value in result._asdict().items() if value is not None}
    read = executor.read([*fields.values(), counts])

    def wait() -> tuple[GuidedSample, Tensor]:
        *values, accepted = read()
        return result._replace(**dict(zip(fields, values))), accepted

    return wait
