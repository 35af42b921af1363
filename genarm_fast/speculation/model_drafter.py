"""Drafts by members, or by a draft model: token by token, sharpened to the weight of all members together.

The members that draft stand for the guided distribution: q ∝ (Π π_i^w_i)^s with s = Σ_all w / Σ_drafting w. So a small
ARM drafts from π_arm^((1 + w)/T), and its forwards are not wasted: what it says of each token is part of the target.
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

AHEAD = 0.1  # of the steps must find all drafts right, or nothing is drafted ahead
MEMORY = 8.0  # steps over which that share is taken
CATCH_UP = 512  # tokens that a draft model is shown at a time, so that a long prompt takes no more memory than that


def tempered_draft(
    batch: SequenceBatch, lanes: list[Tensor], members: tuple[int, ...], positions: Tensor, stream: WorkStream
) -> Tensor:
    """A draft for every sequence, int64 [R, 1], drawn with the noise of its target; everything is on `stream`.

    lanes: logits [R, 1, V] of `members`; a draft model is no member of the target, and drafts with weight 1. positions:
    [R, 1] in the response.
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
    """Draft steps of one runner: each feeds what the one before drew. All of them run on the runner's stream.

    Step 0 feeds the last accepted token, step n the draft of step n - 1; each draws the draft of the next position.
    """

    def __init__(self, executor: DraftExecutor, batch: SequenceBatch, members: tuple[int, ...]) -> None:
        self.executor, self.members = executor, list(members)
        self.stream = executor.stream_of(self.members)
        self.start = [len(sequence.tokens) for sequence in batch.sequences]
        self.sequences, self.epochs = list(batch.sequences), list(batch.epochs)
        inputs = [batch.tokens(self.members), batch.positions(self.members), batch.response_positions(1)]
        self.last, self.positions, self.response = executor.hand_over(inputs, executor.main, self.stream)
        self.fed = 0  # steps since the positions were taken
        self.tokens: list[Tensor] = []  # int64 [R, 1] each
        self.logits: list[list[Tensor]] = []  # of each lane, [R, 1, V]

    def __len__(self) -> int:
        return len(self.tokens)

    def stands(self, batch: SequenceBatch) -> bool:
        """Whether the first step of the rollout is the next one of these sequences."""
        now = [len(sequence.tokens) for sequence in batch.sequences]
        same = self.sequences == list(batch.sequences) and self.epochs == list(batch.epochs)
        return same and self.start == now

    def extend(self, batch: SequenceBatch, steps: int) -> int:
        """Have so many steps; returns how many were missing."""
        missing = steps - len(self)
        for _ in range(missing):
            self.step(batch)
        return max(missing, 0)

    def step(self, batch: SequenceBatch) -> None:
        inputs = (batch, *self.feed(batch), self.stream)
        self.tokens.append(self.executor.device.launch(self.stream, "draft", tempered_draft, *inputs))

    def feed(self, batch: SequenceBatch) -> tuple[list[Tensor], tuple[int, ...], Tensor]:
        """Feed the latest draft; what `tempered_draft` takes for the one that follows it."""
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
        """The first drafts, int64 [R, width]."""
        return self.executor.device.launch(self.stream, "draft", torch.cat, self.tokens[:width], 1)

    def on_main(self, steps: int, *others: Tensor) -> tuple[list[Tensor], dict[int, Tensor]]:
        """`others` for use on the main stream, and what each member says after the first `steps` tokens that it fed,
        [R, steps, V]; {} for none."""
        flat = [lane for logits in self.logits[:steps] for lane in logits]
        given = self.executor.hand_over([*others, *flat], self.stream, self.executor.main)
        given, flat = given[: len(others)], given[len(others) :]
        members = enumerate(self.members) if flat else ()
        return given, {member: torch.cat(flat[i :: len(self.members)], dim=1) for i, member in members}

    def right(self, drawn: list[list[int]]) -> bool:
        """Whether all sequences go on after exactly these tokens, which the rollout drew for them."""
        return all(
            not sequence.ended and sequence.tokens[start:] == line
            for sequence, start, line in zip(self.sequences, self.start, drawn)
        )

    def advance(self, steps: int) -> None:
        """Go on after this many steps, all of whose drafts were right."""
        self.last = self.tokens[steps - 1].expand(len(self.members), -1, -1)
        del self.tokens[:steps], self.logits[:steps]
        self.start = [start + steps for start in self.start]


class ModelDrafter:
    """Drafts by all members of one runner.

    Where the host runs ahead of the device, the drafter goes on from its own last draft while the others verify. If all
    sequences accept everything, the next block is there, or begun; else it is dropped, as wrong drafts are.
    """

    reads_texts = False

    def __init__(self, executor: DraftExecutor, group: int, members: tuple[int, ...], names: tuple[str, ...]) -> None:
        self.executor, self.group, self.members, self.names = executor, group, members, names
        self.foreign = executor.draft_model in members  # no member of the target
        self.rollout: DraftRollout | None = None
        self.batch: SequenceBatch | None = None
        self.right: float | None = None  # share of steps without a wrong draft, of late
        self.fitting = inf  # steps that take no longer than verification, as last measured

    def propose(self, batch: SequenceBatch, most: list[int]) -> Drafts:
        executor, k = self.executor, max(most)
        self.batch = batch
        extra = 0
        if self.rollout is None or not self.rollout.stands(batch):
            if self.foreign:
                extra = self._catch_up(batch.sequences)
            self.rollout = DraftRollout(executor, batch, self.members)
        if self.right is None:
            self.right = 1 / len(most)  # for want of anything better
        stream = self.rollout.stream
        start = executor.device.mark(stream)
        steps = self.rollout.extend(batch, k) + extra
        marks = start, executor.device.mark(stream)
        return Drafts(self.rollout.block(k), most, stream, marks=marks, steps=steps)

    def _catch_up(self, sequences: Any) -> int:
        """Show a draft model what was accepted in steps in which it had no part; whether there was anything."""
        caught = 0
        for sequence in sequences:
            for m in self.members:
                end = sequence.position(m)
                for start in range(sequence.cached[m], end, CATCH_UP):
                    caught = 1
                    self.executor.prefill([sequence], [m], start, min(end - start, CATCH_UP))
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
        (drafts.on_main,), known = rollout.on_main(0 if self.foreign else drafts.fed, drafts.tensor)
        if executor.device.lag:  # after what the main stream waits for
            rollout.extend(batch, self.ahead(k))
        return known

    def captures(self, sequences: list[Any], before: tuple[int, ...] | None) -> bool:
        if not self.foreign:
            return True
        shown = all(each.cached[m] == each.position(m) for each in sequences for m in self.members)
        return shown and before in (None, self.members)  # other steps do not show it their tokens

    def capture(self, batch: SequenceBatch, k: int) -> CapturedDrafts:
        rollout = DraftRollout(self.executor, batch, self.members)
        rollout.extend(batch, k)
        block = rollout.block(k)

        def rest() -> tuple[Tensor, dict[int, Tensor]]:
            rollout.feed(batch)
            (on_main,), known = rollout.on_main(0 if self.foreign else k + 1, block)
            return on_main, known

        return CapturedDrafts(block, rollout.stream, rest)

    def ahead(self, k: int) -> int:
        """Draft steps to have before a verification ends: up to the last draft of the next block, as many as fit."""
        assert self.rollout is not None
        assert self.right is not None
        if self.right < AHEAD:
            return k + 1
        left = min(sequence.remaining for sequence in self.rollout.sequences)
        return min(2 * k + 1, left, k + max(1, int(min(self.fitting, k + 1))))

    def accepted(self, drafts: Drafts, accepted: list[int], drafting: float, verifying: float) -> None:
        rollout, k = self.rollout, drafts.width
        assert rollout is not None
        assert self.right is not None
        if drafts.steps and drafting > 0:
            self.fitting = verifying / (drafting / drafts.steps)
        self.right += (all(right == k for right in accepted) - self.right) / MEMORY
        if drafts.fed > k and rollout.right(drafts.host):
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
        spent = [self.executor.spent[self.group], (start, device.mark(main))]
        read = device.read([tokens], main)
        return lambda: (read()[0].tolist(), sum(device.elapsed(*marks) for marks in spent))
