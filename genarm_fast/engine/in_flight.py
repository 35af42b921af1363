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

    most: tokens that it may give each sequence. read: waits for what it drew. drafting, fed: the members that drafted,
    and how many tokens each of them fed. drafts: of a step that was launched piece by piece. judge: tells shadow
    evaluation what was accepted. logits: of the running members, by member, from which a bonus token may be drawn.
    policy: who chose the step, if the host went on meanwhile; sequences that came or left since may have another one.
    """

    batch: Batch
    choice: Choice
    most: int
    read: Callable[[], HostSample]
    drafting: tuple[int, ...] = ()
    fed: int = 0
    drafts: Drafts | None = None
    judge: Judge = lambda _: None
    logits: dict[int, Tensor] = field(default_factory=dict)
    policy: DraftPolicy | None = None
    advanced: list[Sequence] = field(default_factory=list)  # once it is finished; so are the next two
    right: list[int] = field(default_factory=list)  # accepted drafts of each sequence
    judged: list[int] = field(default_factory=list)  # drafts of each that count as tried; see `Steps.finish`

    def __post_init__(self) -> None:
        for sequence in self.batch.sequences:
            sequence.unread += self.most


def reading(
    executor: Executor, batch: Batch, result: GuidedSample, counts: Tensor, drafts: Drafts
) -> Callable[[], HostSample]:
    """Begin to copy targets and how many are accepted, int64 [R], to the host; call the result to wait for them."""
    fields = {name: value for name, value in result._asdict().items() if value is not None}
    read = executor.read([*fields.values(), counts])

    def wait() -> HostSample:
        with span("read-back"):
            *values, accepted = read()
        logprobs = dict(zip(fields, values))
        tokens, status = (logprobs.pop(name).tolist() for name in ("tokens", "status"))
        return HostSample(tokens, status, accepted.tolist(), drafts.tokens, logprobs, executor.members, batch.active)

    return wait
