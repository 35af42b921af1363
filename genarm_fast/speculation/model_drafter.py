"""Drafts by members or by a draft model, token by token, from a distribution with the total weight of all members.

The drafting members' distribution replaces the guided one: q ∝ (Π π_i^w_i)^s with s = Σ_all w / Σ_drafting w. So a
small ARM drafts from π_arm^((1 + w)/T). Its forwards are not wasted, since its logits are part of the target.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor

from genarm_fast.device.base import WorkStream
from genarm_fast.kernels import guided_sample
from genarm_fast.speculation.drafter import CapturedDrafts, DraftExecutor, Drafts, SequenceBatch

MIN_ALL_RIGHT_SHARE = 0.1  # least share of steps with all drafts right; below it, nothing is drafted ahead
AVERAGED_STEPS = 8.0  # steps over which that share is averaged
CATCH_UP_TOKENS = (
    512  # most tokens that a draft model is fed at a time, so that a long prompt does not take more memory
)


def tempered_draft(
    batch: SequenceBatch, lanes: list[Tensor], members: tuple[int, ...], positions: Tensor, stream: WorkStream
) -> Tensor:
    """Return a draft for every sequence, int64 [R, 1], drawn with the noise of its target. All tensors are on `stream`.

    lanes: logits [R, 1, V], one tensor for each of `members`. A single lane, such as a draft model's, has weight 1.
    positions: positions in the response, [R, 1].
    """
    sampling = batch.sampling(stream)
    lanes = [lane[..., : batch.vocab_size] for lane in lanes]
    if len(lanes) == 1:
        none, parameters = sampling.weights[:, 0, :0], sampling.sharpened(positions, stream)
        return guided_sample(lanes[0], (), none, positions=positions, **parameters).tokens
    weights = sampling.at(positions)
    total = weights.sum(1)
    weights = torch.stack([weights[:, batch.active.index(member)] for member in members], dim=1)
    own = weights.sum(1)
    weights = weights * torch.where((own > 0) & (total > 0), total / own, 1.0)[:, None]
    nothing = lanes[0].new_zeros(lanes[0].shape[-1]).expand(lanes[0].shape)
    return guided_sample(nothing, tuple(lanes), weights, positions=positions, **sampling.parameters).tokens


class DraftRollout:
    """Draft steps of one runner, all on the runner's stream.

    Step 0 feeds the last accepted token, and step n the draft of step n - 1. Each step draws the draft of the next
    position.
    """

    def __init__(self, executor: DraftExecutor, batch: SequenceBatch, members: tuple[int, ...]) -> None:
        self.executor, self.members = executor, list(members)
        self.stream = executor.stream_of(self.members)
        self.start = [len(sequence.tokens) for sequence in batch.sequences]
        self.sequences, self.epochs = list(batch.sequences), list(batch.epochs)
        inputs = [batch.tokens(self.members), batch.positions(self.members), batch.response_positions(1)]
        self.last, self.positions, self.response = executor.hand_over(inputs, executor.main, self.stream)
        self.fed = 0  # steps since `positions` was set
        self.tokens: list[Tensor] = []  # draft of each step, int64 [R, 1]
        self.logits: list[list[Tensor]] = []  # logits of each step and lane, [R, 1, V]

    def __len__(self) -> int:
        return len(self.tokens)

    def continues(self, batch: SequenceBatch) -> bool:
        """Whether the rollout's first step continues these sequences as they are now."""
        now = [len(sequence.tokens) for sequence in batch.sequences]
        same = self.sequences == list(batch.sequences) and self.epochs == list(batch.epochs)
        return same and self.start == now

    def extend(self, batch: SequenceBatch, steps: int) -> int:
        """Run steps until there are `steps`. Returns how many were missing."""
        missing = steps - len(self)
        for _ in range(missing):
            self.step(batch)
        return max(missing, 0)

    def step(self, batch: SequenceBatch) -> None:
        """Feed the latest token, and draw the next draft."""
        inputs = (batch, *self.feed(batch), self.stream)
        self.tokens.append(self.executor.device.launch(self.stream, "draft", tempered_draft, *inputs))

    def feed(self, batch: SequenceBatch) -> tuple[list[Tensor], tuple[int, ...], Tensor]:
        """Feed the latest draft. Returns lanes, members and positions for `tempered_draft` to draw the next one."""
        executor, stream, members = self.executor, self.stream, tuple(self.members)
        bound = batch.kv_bound(self.members, len(self) + 1)
        last = self.tokens[-1].expand(len(members), -1, -1) if self.tokens else self.last

        def place(n: int) -> tuple[Tensor, Tensor]:
            return (self.positions + n, self.response + n) if n else (self.positions, self.response)

        positions, response = executor.device.launch(stream, "draft", place, self.fed)
        self.logits.append(executor.forward(self.members, [last], positions, batch.slots, bound))
        self.fed += 1
        return self.logits[-1], members, response

    def block(self, width: int) -> Tensor:
        """Return the first `width` drafts, int64 [R, width]."""
        return self.executor.device.launch(self.stream, "draft", torch.cat, self.tokens[:width], 1)

    def on_main(self, steps: int, *others: Tensor) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Hand tensors over to the main stream.

        Returns `others`, and each member's logits of the first `steps` steps, [R, steps, V]; {} for 0 steps.
        """
        flat = [lane for logits in self.logits[:steps] for lane in logits]
        given = self.executor.hand_over([*others, *flat], self.stream, self.executor.main)
        given, flat = given[: len(others)], given[len(others) :]
        members = enumerate(self.members) if flat else ()
        return given, {member: torch.cat(flat[i :: len(self.members)], dim=1) for i, member in members}

    def matches(self, drawn: list[list[int]]) -> bool:
        """Whether all sequences go on, and their new tokens are exactly `drawn`, the rollout's drafts."""
        return all(
            not sequence.ended and sequence.tokens[start:] == line
            for sequence, start, line in zip(self.sequences, self.start, drawn)
        )

    def advance(self, steps: int) -> None:
        """Drop the first `steps` steps, all of whose drafts were right, and begin at the next one."""
        self.last = self.tokens[steps - 1].expand(len(self.members), -1, -1)
        del self.tokens[:steps], self.logits[:steps]
        self.start = [start + steps for start in self.start]


class ModelDrafter:
    """Drafts with all members of one runner.

    If the host runs ahead of the device, the drafter goes on from its own last draft while the other members verify. If
    all sequences accept everything, the next block is drafted or begun; else these drafts are dropped.
    """

    reads_texts = False

    def __init__(self, executor: DraftExecutor, group: int, members: tuple[int, ...], names: tuple[str, ...]) -> None:
        self.executor, self.group, self.members, self.names = executor, group, members, names
        self.is_draft_model = executor.draft_model in members  # whether it is the draft model, no member of the target
        self.rollout: DraftRollout | None = None
        self.batch: SequenceBatch | None = None
        self.all_right_share: float | None = None  # share of the latest steps in which all drafts were right
        self.steps_per_verification = inf  # draft steps that fit into the time of a verification, as last measured

    def propose(self, batch: SequenceBatch, most: list[int]) -> Drafts:
        executor, k = self.executor, max(most)
        self.batch = batch
        extra = 0
        if self.rollout is None or not self.rollout.continues(batch):
            if self.is_draft_model:
                extra = self._catch_up(batch.sequences)
            self.rollout = DraftRollout(executor, batch, self.members)
        if self.all_right_share is None:
            self.all_right_share = 1 / len(most)  # a first guess: with more sequences, all drafts are right less often
        stream = self.rollout.stream
        start = executor.device.mark(stream)
        steps = self.rollout.extend(batch, k) + extra
        marks = start, executor.device.mark(stream)
        return Drafts(self.rollout.block(k), most, stream, marks=marks, steps=steps)

    def _catch_up(self, sequences: Any) -> int:
        """Prefill a draft model with tokens of steps in which it did not draft. Returns 1 if there were any, else 0."""
        caught = 0
        for sequence in sequences:
            for m in self.members:
                end = sequence.position(m)
                for start in range(sequence.cached[m], end, CATCH_UP_TOKENS):
                    caught = 1
                    self.executor.prefill([sequence], [m], start, min(end - start, CATCH_UP_TOKENS))
        return caught

    def target_logits(self, drafts: Drafts) -> dict[int, Tensor]:
        executor, rollout, batch, k = self.executor, self.rollout, self.batch, drafts.width
        assert rollout is not None
        assert batch is not None
        if executor.device.lag:
            rollout.extend(batch, k + 1)
        drafts.fed, drafts.members = k + (len(rollout) > k), self.members
        read = executor.device.read([rollout.block(drafts.fed)], rollout.stream)
        drafts.read = lambda: read()[0]
        (drafts.on_main,), known = rollout.on_main(0 if self.is_draft_model else drafts.fed, drafts.tensor)
        if executor.device.lag:  # drafts ahead are launched last, after the tensors that the main stream waits for
            rollout.extend(batch, self.ahead(k))
        return known

    def captures(self, sequences: list[Any], before: tuple[int, ...] | None) -> bool:
        if not self.is_draft_model:
            return True
        shown = all(each.cached[m] == each.position(m) for each in sequences for m in self.members)
        return shown and before in (None, self.members)  # the step in flight has to feed it its tokens too

    def capture(self, batch: SequenceBatch, k: int) -> CapturedDrafts:
        rollout = DraftRollout(self.executor, batch, self.members)
        rollout.extend(batch, k)
        block = rollout.block(k)

        def rest() -> tuple[Tensor, dict[int, Tensor]]:
            rollout.feed(batch)
            (on_main,), known = rollout.on_main(0 if self.is_draft_model else k + 1, block)
            return on_main, known

        return CapturedDrafts(block, rollout.stream, rest)

    def ahead(self, k: int) -> int:
        """Return the number of draft steps to launch before a verification ends, those of its own block included.

        They reach the last draft of the next block at most, and as many as fit into the time of the verification.
        """
        assert self.rollout is not None
        assert self.all_right_share is not None
        if self.all_right_share < MIN_ALL_RIGHT_SHARE:
            return k + 1
        left = min(sequence.remaining for sequence in self.rollout.sequences)
        return min(2 * k + 1, left, k + max(1, int(min(self.steps_per_verification, k + 1))))

    def accepted(self, drafts: Drafts, accepted: list[int], drafting: float, verifying: float) -> None:
        rollout, k = self.rollout, drafts.width
        assert rollout is not None
        assert self.all_right_share is not None
        if drafts.steps and drafting > 0:
            self.steps_per_verification = verifying / (drafting / drafts.steps)
        all_right = all(count == k for count in accepted)
        self.all_right_share += (all_right - self.all_right_share) / AVERAGED_STEPS
        if drafts.fed > k and rollout.matches(drafts.host):
            rollout.advance(k + 1)
        else:
            self.rollout = None
        self.batch = None

    def forget(self) -> None:
        self.rollout = self.batch = None

    def guess(self, sequences: list[Any], most: int) -> list[list[int]] | None:
        return None

    def shadow(self, batch: SequenceBatch, logits: dict[int, Tensor]) -> Callable[[], tuple[list[list[int]], float]]:
        device, main = self.executor.device, self.executor.main
        start = device.mark(main)
        lanes = [logits[member][:, :1] for member in self.members]
        tokens = tempered_draft(batch, lanes, self.members, batch.response_positions(1), main)
        spent = [self.executor.forward_marks[self.group], (start, device.mark(main))]
        read = device.read([tokens], main)
        return lambda: (read()[0].tolist(), sum(device.elapsed(*marks) for marks in spent))
