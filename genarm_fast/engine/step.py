"""One step of the decode loop: propose → verify → sample → accept → next inputs.

Before a step, every running member's cache holds all tokens of each sequence but the last one. A step feeds that token
and the drafts that follow it, and draws the target of each of these positions. It accepts targets up to the first one
that differs from the draft. Without drafts this is plain decoding. Drafts change how many steps a text takes, and never
the text: drafter and target draw a position with the same noise (docs/design.md).
"""

from __future__ import annotations

from functools import partial
from operator import eq

import torch
from torch import Tensor

from genarm_fast.device.base import span
from genarm_fast.engine.batch import Batch
from genarm_fast.engine.executor import Executor
from genarm_fast.engine.in_flight import InFlight, begin_reading
from genarm_fast.engine.penalties import bans_stop
from genarm_fast.engine.sampler import Sampler
from genarm_fast.engine.sequence import Reported, Sequence, members_of
from genarm_fast.engine.step_graph import StepGraph
from genarm_fast.engine.verify import collect_logits, launch_verification
from genarm_fast.speculation.drafter import Drafter, Drafts, no_drafts
from genarm_fast.speculation.observations import PLAIN, Choice, StepObservation
from genarm_fast.speculation.policy import DraftPolicy
from genarm_fast.speculation.shadow import judge_of_first, model_shadows, shadow_drafters


class Steps:
    """Launches steps and finishes them. `before` is the batch of the latest step, `in_flight` a step that is unread."""

    def __init__(self, executor: Executor, sampler: Sampler, drafters: list[Drafter]) -> None:
        self.executor, self.sampler, self.drafters = executor, sampler, drafters
        self.graph = StepGraph(executor, sampler)
        self.before: Batch | None = None
        self.in_flight: InFlight | None = None

    def forget(self) -> None:
        """Drop the state on the device. The next step begins from what the host knows of the sequences."""
        self.before = self.in_flight = None
        for drafter in self.drafters:
            drafter.forget()

    @property
    def text_width(self) -> int:
        """Width of texts on the device. Targets after the end of a finished text are written there, as in the cache."""
        return self.executor.runners[0].capacity + 1

    def batch(self, sequences: list[Sequence], *, padded: bool = False, texts: bool = False) -> Batch:
        """Return the batch of the next step, with these sequences and all members that they need.

        padded: raise the number of rows to one of the device's shapes. texts: keep texts on the device to draft from.
        """
        active, executor = members_of(sequences), self.executor
        width, flying = 0, self.in_flight is not None
        if padded:
            slots = max(executor.runners[g].slots for g in executor.by_runner(active))
            width = executor.device.shape(len(sequences), slots, 1, 1)[0]
        vocab_size, shape = self.sampler.vocab_size, (width, self.text_width if texts else 0)
        self.before = Batch.following(self.before, flying, sequences, active, executor, vocab_size, shape)
        return self.before

    def continuing(self, sequences: list[Sequence]) -> list[Sequence]:
        """Return the sequences that another step may advance. Each gets at least one token from a step in flight."""
        return [each for each in sequences if each.remaining > bool(each.unread)]

    def fits_one_launch(self, sequences: list[Sequence], policy: DraftPolicy, choice: Choice) -> bool:
        """Whether a step can be one launch: the device captures it, and the host has no part in it."""
        if any(each.request.needs_host for each in sequences) or policy.timing_due():
            return False
        members = members_of(sequences)
        if choice.drafter is not None:
            drafter = self.drafters[choice.drafter]
            members = tuple(sorted({*members, *drafter.members}))
            for each in sequences:  # all get the same number of drafts, and one bias counts for all positions
                if each.speculation.most < choice.k or bans_stop(each, len(each.tokens)):
                    return False
            before = None if self.in_flight is None else self.in_flight.drafting
            if not drafter.captures(sequences, before):
                return False
        return self.graph.can_capture(members)

    def run_ahead(
        self, sequences: list[Sequence], policy: DraftPolicy, choice: Choice, *, one_launch: bool
    ) -> InFlight | None:
        """Launch a step, and then finish the previous step. Returns the previous step, or None if there was none.

        whole: whether the step is one launch; else it must be without drafts.
        """
        before, self.executor.timed = self.in_flight, bool(policy.tuner_candidates)
        batch = self.batch(sequences, padded=True, texts=self._texts(policy))
        self.in_flight = self.launch(batch, policy, choice, one_launch)
        self.in_flight.policy = policy
        if before is not None:
            self.finish(before)
        return before

    def drain(self) -> list[Sequence]:
        """Finish a step in flight, so that the host knows what the device knows. Returns the sequences it advanced."""
        before, self.in_flight = self.in_flight, None
        if before is None:
            return []
        self.finish(before)
        return before.advanced

    def run(self, sequences: list[Sequence], policy: DraftPolicy, choice: Choice) -> None:
        """Run a step and wait for it, because the host has to see each token or takes part in drafting."""
        executor = self.executor
        mark, elapsed = executor.device.mark, executor.device.elapsed
        drafter = None if choice.drafter is None else self.drafters[choice.drafter]
        executor.timed = bool(policy.tuner_candidates)
        start = mark(executor.main)
        batch = self.batch(sequences, texts=self._texts(policy))
        step = self.launch(batch, policy, choice)
        drafts = step.drafts
        assert drafts is not None
        self.finish(step)
        verified = mark(executor.main)
        if drafter is not None and drafts.width and self._bonus(step, drafter, drafts.width):
            drafts.steps += 1
        ended = mark(executor.main)
        drafting = elapsed(*drafts.marks) if drafts.marks else 0.0
        verifying = elapsed(start, verified) - drafting
        if drafter is not None and drafts.width:
            drafter.accepted(drafts, step.accepted_counts, drafting, verifying)
        drafting += elapsed(verified, ended)
        rows, judged = len(sequences), (step.tried_counts, step.accepted_counts)
        policy.observe(StepObservation(choice.drafter, rows, choice.k, *judged, drafting, verifying, drafts.steps))

    def observe(self, step: InFlight, seconds: float) -> None:
        """Report a finished step, during which the host went on, to the policy that chose it. seconds: its time."""
        if step.policy is not None and step.policy.tuner_candidates:
            drafter, k = step.choice
            drafting = 0.0 if drafter is None else None  # a step with drafts was one launch: their time is unknown
            rows, judged = len(step.batch), (step.tried_counts, step.accepted_counts)
            step.policy.observe(StepObservation(drafter, rows, k, *judged, drafting, seconds))

    def _texts(self, policy: DraftPolicy) -> bool:
        """Whether steps may be one launch and a drafter reads texts, so that texts have to be on the device."""
        return self.executor.device.lag > 0 and any(self.drafters[i].reads_texts for i in policy.usable_drafters)

    def _launch_as_graph(self, batch: Batch, policy: DraftPolicy, choice: Choice) -> InFlight:
        """Launch a step as one graph, in which all sequences get choice.k drafts."""
        executor, k = self.executor, choice.k
        drafter = None if choice.drafter is None else self.drafters[choice.drafter]
        shadows = shadow_drafters(policy, self.drafters, batch.active, choice.drafter)
        report = self.graph.launch(batch, drafter, k, shadows=tuple(self.drafters[i].members for i in shadows))
        read = executor.read([report.numbers, *report.logprobs.values()])
        host = partial(report.unpack, read, executor.members, batch.active)
        judge = judge_of_first(policy, shadows, lambda: report.guesses(read()[0]))
        drafting = () if drafter is None else drafter.members
        return InFlight(batch, choice, 1 + k, host, drafting, k + 1, judge=judge)

    def launch(self, batch: Batch, policy: DraftPolicy, choice: Choice, one_launch: bool = False) -> InFlight:
        """Launch all device work of a step, as one graph (`one_launch`) or in pieces. The host reads nothing yet."""
        if one_launch:
            return self._launch_as_graph(batch, policy, choice)
        drafts = self._propose(batch, choice)
        drafter = self.drafters[choice.drafter] if choice.drafter is not None and drafts.width else None
        drafting = () if drafter is None else drafter.members
        launched = launch_verification(self.executor, batch, drafting, drafts.tensor, drafts.stream)
        logits = drafter.target_logits(drafts) if drafter is not None else {}
        logits |= collect_logits(self.executor, launched)
        # A member that feeds the last token and k drafts gives logits for k + 1 targets. A drafter that has not fed its
        # last draft gives k: then `_bonus` draws the bonus token later, if all drafts were right.
        known = min(each.shape[1] for each in logits.values())
        judge = model_shadows(policy, self.drafters, batch, logits, choice.drafter if drafter is not None else None)
        step = self._targets(batch, choice, [logits[m][:, :known] for m in batch.active], drafts)
        step.judge, step.logits = judge, logits
        return step

    def _targets(self, batch: Batch, choice: Choice, logits: list[Tensor], drafts: Drafts) -> InFlight:
        """Sample targets from each running member's logits [R, q, V], and accept the drafts that equal them."""
        with span("sample"):
            result = self.sampler.sample(batch, logits, drafts)
        with span("accept"):
            block, counts = self._draft_block(drafts, result.tokens.shape[1] - 1, result.tokens)
            settled = batch.accept(result.tokens, block, counts)
        read = begin_reading(self.executor, batch, result, settled.counts, drafts)
        # Such a step is in flight during another launch only if it has no drafts. So the 1, for `unread`, is right.
        return InFlight(batch, choice, 1, read, drafts.members, drafts.fed, drafts)

    def _propose(self, batch: Batch, choice: Choice) -> Drafts:
        most = [self._most_drafts(sequence, choice.k) for sequence in batch.sequences]
        if choice.drafter is None or max(most) <= 0:
            return no_drafts(len(most), self.executor.main)
        with span("draft"):
            return self.drafters[choice.drafter].propose(batch, most)

    def _most_drafts(self, sequence: Sequence, k: int) -> int:
        """Return the most drafts of a sequence, at most k, that its limits allow.

        While stop tokens are banned, the ban has to hold at all positions of the step, since they share one bias.
        """
        length = len(sequence.tokens)
        if bans_stop(sequence, length):
            k = min(k, sequence.request.params.min_new_tokens - length - 1)
        if sequence.speculation.k is not None:
            k = min(k, sequence.speculation.k)
        return min(k, sequence.remaining - 1)

    def _draft_block(self, drafts: Drafts, width: int, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the drafts [R, width] to compare with targets, on the main stream, and each sequence's number of them.

        The second is None if all sequences have `width` drafts.
        """
        if not drafts.width:
            return targets[:, :0], None
        counts = None
        if min(drafts.counts) < width:
            counts = self.executor.upload(torch.tensor([min(count, width) for count in drafts.counts]))
        return drafts.on_main[:, :width], counts

    def finish(self, step: InFlight) -> None:
        """Wait for a step, give its sequences their tokens, and list those that advanced in `step.advanced`.

        A sequence is stale if it has ended, was steered, or has lost its slot since the launch: its tokens are dropped.

        `step.accepted_counts` has each sequence's number of accepted drafts, `step.tried_counts` that of drafts that
        count as tried. If a draft is wrong, all count as tried. Else the text may have ended before the last draft: of
        4 drafts, a text that ends with the second token has tried 2.
        """
        host, batch = step.read(), step.batch
        news: list[list[int]] = []
        for r, sequence in enumerate(batch.sequences):
            stale = sequence.ended or sequence.epoch != batch.epochs[r] or sequence.slot != batch.slots[r]
            tokens, drafted = ([], []) if stale else (host.of(r, sequence), host.drafts[r])
            right = 0
            if drafted:
                drafted = drafted[: sequence.remaining - 1]  # a step that is one launch may have more than the limit
                right = sum(map(eq, tokens, drafted))
                sequence.drafted += len(drafted)
                sequence.accepted += right
            step.accepted_counts.append(right)
            step.tried_counts.append(right if right == len(tokens) else len(drafted))
            news.append(tokens)
            if not stale:
                sequence.unread -= step.max_tokens  # not for stale sequences: steering has set their `unread` to 0
                step.advanced.append(sequence)
                wanted = sequence.request.wants_logprobs
                self._append(step, sequence, tokens, host.reported(r, sequence, len(tokens)) if wanted else None)
        step.judge(news)

    def _append(self, step: InFlight, sequence: Sequence, tokens: list[int], reported: list[Reported] | None) -> None:
        """Append tokens to a sequence, and count the tokens that the members' caches hold of it now.

        A member that ran has fed the last token and all accepted drafts. So its cache again lacks the new last token
        alone, and `cached` grows by as much as the text. A draft model may have fed fewer tokens, `step.fed`. A member
        whose cache was behind before the step did not run, and stays behind until it is prefilled.
        """
        before, cached, starts = len(sequence.tokens), sequence.cached, sequence.request.starts
        for i, token in enumerate(tokens):
            if sequence.finish_reason is None:
                sequence.append(token, reported[i] if reported else None)
        count, active = len(sequence.tokens) - before, step.batch.active
        for m in active:
            if cached[m] == starts[m] + before:
                cached[m] += count
        for m in step.drafting:
            if m not in active and cached[m] == starts[m] + before:  # only a draft model drafts without being active
                cached[m] += min(count, step.fed)

    def _bonus(self, step: InFlight, drafter: Drafter, width: int) -> bool:
        """Draw the bonus token of sequences whose drafts were all right, if the drafter had not fed its last draft.

        Example: an ARM drafts a and b. The ARM has fed the last token and a, the base the last token, a and b. If both
        drafts are right, the base's logits after b are known, and the ARM's forward on b is missing: it is run here.
        width: drafts of the sequence that has most. Returns whether there was such a sequence.
        """
        executor, sequences, active = self.executor, step.batch.sequences, step.batch.active
        members = [m for m in drafter.members if m in active]
        if not members or step.fed > width:
            return False
        rows = [
            r
            for r, sequence in enumerate(sequences)
            if step.accepted_counts[r] == width and not sequence.ended and sequence.epoch == step.batch.epochs[r]
        ]
        if not rows:
            return False
        batch = Batch([sequences[r] for r in rows], active, executor, self.sampler.vocab_size)
        stream = executor.stream_of(members)
        inputs = executor.hand_over([batch.tokens(members), batch.positions(members)], executor.main, stream)
        bound = batch.kv_bound(members, 1)
        own = executor.collect(members, executor.forward(members, [inputs[0]], inputs[1], batch.slots, bound))
        index = executor.upload(torch.tensor(rows))
        logits = [own[m] if m in own else step.logits[m][index, width:] for m in batch.active]
        self.finish(self._targets(batch, PLAIN, logits, no_drafts(len(rows), executor.main)))
        self.before = None  # the step's state on the device lacks these tokens, so the next batch is made anew
        return True
