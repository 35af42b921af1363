"""One step of the decode loop: propose → verify → sample → accept → next inputs.

Before a step every running member's cache holds all but the last token of each sequence. A step feeds that token and
the drafts that follow it, and draws the target of each of these positions. It accepts targets up to the first one that
differs from the draft. Without drafts this is plain decoding. Drafts change how many steps a text takes, never the
text: drafter and target draw a position with the same noise (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genarm_fast.device.base import span
from genarm_fast.engine.batch import Batch
from genarm_fast.engine.executor import Executor
from genarm_fast.engine.penalties import bans_stop, needs_host
from genarm_fast.engine.sampler import HostSample, Sampler
from genarm_fast.engine.sequence import Sequence
from genarm_fast.engine.step_graph import StepGraph
from genarm_fast.kernels import GuidedSample
from genarm_fast.speculation.drafter import Drafter, Drafts, no_drafts
from genarm_fast.speculation.observations import PLAIN, Choice, StepObservation
from genarm_fast.speculation.policy import DraftPolicy
from genarm_fast.speculation.shadow import Judge, model_shadows


@dataclass
class InFlight:
    """A step that was launched, and that the host has not read.

    read: waits for the targets and for how many of them were accepted. epochs: of each sequence's weights, as the step
    was launched. judge: tells shadow evaluation what was accepted. logits: of the running members, by member, from
    which a bonus token may be drawn.
    """

    batch: Batch
    sequences: list[Sequence]
    epochs: list[int]
    drafts: Drafts
    read: Callable[[], tuple[HostSample, list[int]]]
    judge: Judge = lambda _: None
    logits: dict[int, Tensor] = field(default_factory=dict)
    right: list[int] = field(default_factory=list)  # accepted drafts of each sequence, once it is finished
    judged: list[int] = field(default_factory=list)  # drafts of each that count as tried; see `finish`


class Steps:
    """Launches steps and finishes them; `before` is the batch of the latest one."""

    def __init__(self, executor: Executor, sampler: Sampler, drafters: list[Drafter]) -> None:
        self.executor, self.sampler, self.drafters = executor, sampler, drafters
        self.graph = StepGraph(executor, sampler)
        self.before: Batch | None = None
        self.in_flight: InFlight | None = None

    def forget(self) -> None:
        """Drop what the device knows of sequences; the next step begins from what the host knows."""
        self.before = self.in_flight = None
        for drafter in self.drafters:
            drafter.forget()

    def batch(self, sequences: list[Sequence], *, padded: bool = False) -> Batch:
        """The batch of a next step with these sequences, and with the members that any of them needs.

        padded: with as many rows as the device likes.
        """
        active, executor = tuple(sorted({m for sequence in sequences for m in sequence.needed})), self.executor
        width, flying = 0, self.in_flight is not None
        if padded:
            slots = max(executor.runners[g].slots for g in executor.by_runner(active))
            width = executor.device.shape(len(sequences), slots, 1, 1)[0]
        vocab_size = self.sampler.vocab_size
        self.before = Batch.following(self.before, flying, sequences, active, executor, vocab_size, width)
        return self.before

    def run_ahead(self, sequences: list[Sequence], policy: DraftPolicy) -> list[Sequence]:
        """Launch a plain step before the one before it is read, and finish that one; returns what it advanced."""
        before = self.in_flight
        going = [each for each in sequences if each.remaining > each.unread]
        self.executor.timed = bool(policy.candidates)
        self.in_flight = self.launch(self.batch(going, padded=True), policy, PLAIN) if going else None
        return self.finish(before) if before is not None else []

    def drain(self) -> list[Sequence]:
        """Finish what is in flight: afterwards the host knows all that the device knows. Returns what it advanced."""
        before, self.in_flight = self.in_flight, None
        return self.finish(before) if before is not None else []

    def run(self, sequences: list[Sequence], policy: DraftPolicy, choice: Choice) -> list[Sequence]:
        """A step that the host waits for, because it has to see each token or because there are drafts."""
        executor = self.executor
        mark, elapsed = executor.device.mark, executor.device.elapsed
        drafter = None if choice.drafter is None else self.drafters[choice.drafter]
        executor.timed = bool(policy.candidates)
        start = mark(executor.main)
        batch = self.batch(sequences)
        step = self.launch(batch, policy, choice)
        finished = self.finish(step)
        verified = mark(executor.main)
        drafts = step.drafts
        if drafter is not None and drafts.width and self._bonus(step, drafter):
            drafts.steps += 1
        ended = mark(executor.main)
        for sequence, count, right in zip(step.sequences, drafts.counts, step.right):
            sequence.drafted += count
            sequence.accepted += right
        drafting = elapsed(*drafts.marks) if drafts.marks else 0.0
        verifying = elapsed(start, verified) - drafting
        if drafter is not None and drafts.width:
            drafter.accepted(drafts, step.right, drafting, verifying)
        drafting += elapsed(verified, ended)
        policy.observe(
            StepObservation(
                choice.drafter,
                len(sequences),
                choice.k,
                step.judged,
                step.right,
                drafting,
                verifying,
                drafts.steps,
            )
        )
        return finished

    def launch(self, batch: Batch, policy: DraftPolicy, choice: Choice) -> InFlight:
        """Everything that the device has to do for a step; nothing is read."""
        if choice == PLAIN and not policy.shadow_due() and self._in_one(batch):
            result, counts = self.graph.launch(batch)
            return self._flying(batch, result, counts, no_drafts(len(batch.rows), self.executor.main))
        drafts = self._propose(batch, choice)
        drafter = self.drafters[choice.drafter] if choice.drafter is not None and drafts.width else None
        logits = self._verify(batch, drafter, drafts)
        # Of k drafts a member that feeds them all gives k + 1 targets. A drafter that has not fed its last draft gives
        # k: then the bonus target is drawn later, by `_bonus`, if it is needed at all.
        known = min(each.shape[1] for each in logits.values())
        judge = model_shadows(policy, self.drafters, batch, logits, choice.drafter if drafter is not None else None)
        step = self._targets(batch, [logits[m][:, :known] for m in batch.active], drafts)
        step.judge, step.logits = judge, logits
        return step

    def _targets(self, batch: Batch, logits: list[Tensor], drafts: Drafts) -> InFlight:
        """Sample the targets of logits [R, q, V] of each running member, and accept drafts by them."""
        with span("sample"):
            result = self.sampler.sample(batch, logits, drafts)
        with span("accept"):
            block, counts = self._draft_block(drafts, result.tokens.shape[1] - 1, result.tokens)
            settled = batch.accept(result.tokens, block, counts)
        return self._flying(batch, result, settled.counts, drafts)

    def _in_one(self, batch: Batch) -> bool:
        """Whether the device can have this step as one launch, and nothing of it is the host's."""
        return not any(map(needs_host, batch.sequences)) and self.graph.serves(batch.active)

    def _flying(self, batch: Batch, result: GuidedSample, counts: Tensor, drafts: Drafts) -> InFlight:
        read = self._read(result, counts, batch.active)
        for sequence in batch.sequences:
            sequence.unread += 1  # plain steps alone are in flight while the next one is launched
        return InFlight(batch, batch.sequences, list(batch.epochs), drafts, read)

    def _propose(self, batch: Batch, choice: Choice) -> Drafts:
        most = [self._most_drafts(sequence, choice.k) for sequence in batch.sequences]
        if choice.drafter is None or max(most) <= 0:
            return no_drafts(len(most), self.executor.main)
        with span("draft"):
            return self.drafters[choice.drafter].propose(batch, most)

    def _most_drafts(self, sequence: Sequence, k: int) -> int:
        """Within the limit; and while stop tokens are banned, since all positions of a step have one bias."""
        length = len(sequence.tokens)
        if bans_stop(sequence, length):
            k = min(k, sequence.request.params.min_new_tokens - length - 1)
        if sequence.speculation.k is not None:
            k = min(k, sequence.speculation.k)
        return min(k, sequence.remaining - 1)

    def _verify(self, batch: Batch, drafter: Drafter | None, drafts: Drafts) -> dict[int, Tensor]:
        """Each running member's logits after the last token and after every draft, [R, q, V]."""
        executor = self.executor
        launched = []
        for members in executor.by_runner(batch.active).values():
            if drafter is not None and set(members) <= set(drafter.members):
                continue
            stream = executor.stream_of(members)
            width = 1 + drafts.width
            tokens, positions = executor.hand_over(
                [batch.tokens(members), batch.positions(members)], executor.main, stream
            )
            pieces = [tokens]
            if drafts.width:
                (block,) = executor.hand_over([drafts.tensor], drafts.stream, stream)
                pieces.append(block.expand(len(members), -1, -1))
                positions = executor.launch(stream, "draft", _following, positions, width)
            bound = batch.kv_bound(members, width)
            launched.append((members, executor.forward(members, pieces, positions, batch.slots, bound)))
        logits = drafter.target_logits(drafts) if drafter is not None else {}
        for members, lanes in launched:
            logits |= executor.collect(members, lanes)
        return logits

    def _draft_block(self, drafts: Drafts, width: int, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """The drafts [R, width] that targets are compared with, on the main stream, and how many each sequence has."""
        if not drafts.width:
            return targets[:, :0], None
        counts = None
        if min(drafts.counts) < width:
            counts = self.executor.upload(torch.tensor([min(count, width) for count in drafts.counts]))
        return drafts.on_main[:, :width], counts

    def _read(
        self, result: GuidedSample, counts: Tensor, active: tuple[int, ...]
    ) -> Callable[[], tuple[HostSample, list[int]]]:
        """Begin to copy a result to the host; call the result to wait for it."""
        fields = {name: value for name, value in result._asdict().items() if value is not None}
        read = self.executor.read([*fields.values(), counts])
        names = [self.executor.members[m].name for m in active]

        def wait() -> tuple[HostSample, list[int]]:
            with span("read-back"):
                *values, accepted = read()
            return HostSample(result._replace(**dict(zip(fields, values))), names, active), accepted.tolist()

        return wait

    def finish(self, step: InFlight) -> list[Sequence]:
        """Wait for a step and give its sequences their tokens. Returns the sequences that it advanced.

        A sequence is stale if it has ended, was steered, or has lost its slot since the launch: its tokens are dropped.

        `step.right` counts its drafts that were accepted, `step.judged` those that count as tried. After a wrong draft
        that is all of them. Without one, the text may have ended before the last draft's turn: of 4 drafts, a text that
        ends with the second token has tried 2.
        """
        host, counts = step.read()
        advanced, news = [], []
        for r, sequence in enumerate(step.sequences):
            drafted = step.drafts.tokens[r]
            stale = sequence.ended or sequence.epoch != step.epochs[r] or sequence.slot != step.batch.slots[r]
            if not stale:  # steering set `unread` to 0, so it counts launches after that alone
                sequence.unread -= 1
            drawn = [] if stale else host.of(r, sequence, counts[r])
            right = sum(each.token == token for each, token in zip(drawn, drafted))
            step.right.append(right)
            step.judged.append(right if right == len(drawn) else len(drafted))
            news.append([each.token for each in drawn])
            if not stale:
                advanced.append(sequence)
                self._append(step, sequence, r, drawn)
        step.judge(news)
        return advanced

    def _append(self, step: InFlight, sequence: Sequence, r: int, drawn: list[Any]) -> None:
        """Append tokens to a sequence, and count what the members' caches hold of it now.

        A member that ran fed the last token and all accepted drafts, so its cache again lacks the new last token alone:
        `cached` grows by as much as the text. A draft model may have fed fewer, `drafts.fed`. A member whose cache was
        behind before the step did not run, and stays behind until it is prefilled.
        """
        current = [m for m in range(len(sequence.cached)) if sequence.cached[m] == sequence.position(m)]
        before = len(sequence.tokens)
        for each in drawn:
            if sequence.finish_reason is None:
                sequence.append(each)
        count = len(sequence.tokens) - before
        for m in current:
            if m in step.batch.active:
                sequence.cached[m] += count
            elif m in step.drafts.members:  # a draft model that drafted this step
                sequence.cached[m] += min(count, step.drafts.fed)

    def _bonus(self, step: InFlight, drafter: Drafter) -> bool:
        """One more token for sequences whose every draft was right, where the drafter had not fed its last draft yet.

        With drafts a, b of an ARM: the ARM has fed the last token and a, the base the last token, a and b. If both are
        right, the base's logits after b are at hand, and the ARM's forward on b alone is missing: it is made up here.
        Returns whether there was such a sequence.
        """
        executor, width = self.executor, step.drafts.width
        members = [m for m in drafter.members if m in step.batch.active]
        if not members or step.drafts.fed > width:
            return False
        rows = [
            r
            for r, sequence in enumerate(step.sequences)
            if step.right[r] == width and not sequence.ended and sequence.epoch == step.epochs[r]
        ]
        if not rows:
            return False
        batch = Batch([step.sequences[r] for r in rows], step.batch.active, executor, self.sampler.vocab_size)
        stream = executor.stream_of(members)
        inputs = executor.hand_over([batch.tokens(members), batch.positions(members)], executor.main, stream)
        bound = batch.kv_bound(members, 1)
        own = executor.collect(members, executor.forward(members, [inputs[0]], inputs[1], batch.slots, bound))
        index = executor.upload(torch.tensor(rows))
        logits = [own[m] if m in own else step.logits[m][index, width:] for m in batch.active]
        self.finish(self._targets(batch, logits, no_drafts(len(rows), executor.main)))
        self.before = None  # the device's state of the step does not know of these tokens
        return True


def _following(positions: Tensor, width: int) -> Tensor:
    """Positions [L, R, 1] of the last tokens → of them and what follows, [L, R, width]."""
    return positions + torch.arange(width, device=positions.device)
