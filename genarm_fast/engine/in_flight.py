"""Steps in flight: launched on the device, and not yet read by the host."""

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
    """A launched step, with all that `Steps.finish` needs.

    max_tokens: most tokens that the step may give each sequence. read: waits for the tokens that it drew. drafting:
    the members that drafted. fed: how many tokens each of these fed. drafts: the drafts, if the step was launched
    piece by piece. judge: tells shadow evaluation which tokens were accepted. logits: the running members' logits,
    by member, from which a bonus token may be drawn. policy: the draft policy that chose the step, if the host went
    on meanwhile; sequences that came or left since may have another one.
    """

    batch: Batch
    choice: Choice
    max_tokens: int
    read: Callable[[], HostSample]
    drafting: tuple[int, ...] = ()
    fed: int = 0
    drafts: Drafts | None = None
    judge: Judge = lambda _: None
    logits: dict[int, Tensor] = field(default_factory=dict)
    policy: DraftPolicy | None = None
    # `Steps.finish` fills these: sequences that got tokens, and for each sequence of the batch its accepted drafts and
    # its drafts that count as tried.
    advanced: list[Sequence] = field(default_factory=list)
    accepted_counts: list[int] = field(default_factory=list)
    tried_counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for sequence in self.batch.sequences:
            sequence.unread += self.max_tokens


def begin_reading(
    executor: Executor, batch: Batch, result: GuidedSample, counts: Tensor, drafts: Drafts
) -> Callable[[], HostSample]:
    """Begin to copy a step's targets to the host. Returns a function that waits for them.

    counts: how many targets of each row are accepted, int64 [R].
    """
    fields = {name: value for name, value in result._asdict().items() if value is not None}
    read = executor.read([*fields.values(), counts])

    def wait() -> HostSample:
        with span("read-back"):
            *values, accepted = read()
        logprobs = dict(zip(fields, values))
        tokens, status = (logprobs.pop(name).tolist() for name in ("tokens", "status"))
        return HostSample(tokens, status, accepted.tolist(), drafts.tokens, logprobs, executor.members, batch.active)

    return wait
