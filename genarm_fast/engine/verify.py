"""Verification: forwards of all running members over the last token of each sequence and the drafts that follow it."""

from __future__ import annotations

import torch
from torch import Tensor

from genarm_fast.device.base import WorkStream
from genarm_fast.engine.batch import Batch
from genarm_fast.engine.executor import Executor


def launch_verification(
    executor: Executor, batch: Batch, drafting: tuple[int, ...], drafts: Tensor, stream: WorkStream
) -> list[tuple[list[int], list[Tensor]]]:
    """Launch the forwards of all runners except the one whose members draft. Pass the result to `collect_logits`.

    drafting: members that draft. drafts: int64 [R, k] on `stream`.
    """
    launched, width = [], 1 + drafts.shape[1]
    for members in executor.by_runner(batch.active).values():
        if set(members) <= set(drafting):
            continue
        own = executor.stream_of(members)
        given, of_main = [batch.tokens(members), batch.positions(members)], stream == executor.main
        tokens, positions, *blocks = executor.hand_over(
            [*given, drafts] if of_main and width > 1 else given, executor.main, own
        )
        pieces = [tokens]
        if width > 1:
            (block,) = blocks or executor.hand_over([drafts], stream, own)
            pieces.append(block.expand(len(members), -1, -1))
            positions = executor.launch(own, "draft", _following, positions, width)
        bound = batch.kv_bound(members, width)
        launched.append((members, executor.forward(members, pieces, positions, batch.slots, bound)))
    return launched


def collect_logits(executor: Executor, launched: list[tuple[list[int], list[Tensor]]]) -> dict[int, Tensor]:
    """Return the logits [R, q, V] of each launched member, for use on the main stream."""
    return {m: each for members, lanes in launched for m, each in executor.collect(members, lanes).items()}


def _following(positions: Tensor, width: int) -> Tensor:
    """Return positions [L, R, width] that go on from positions [L, R, 1] of the last tokens."""
    return positions + torch.arange(width, device=positions.device)
