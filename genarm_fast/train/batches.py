"""Batches of pairs: which pairs go together, and how they are laid out for one forward pass."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Sampler

from genarm_fast.kernels.arm_logps import IGNORE
from genarm_fast.train.encode import Encoded

Layout = Literal["shared", "rows"]
NO_PAIR_INDEX = -1  # index of `NO_PAIR`, which ends the data set
NO_PAIR = Encoded(-1, [0], [0], [0])  # fills the batch of a process while another has the last pair
POOL = 32  # micro-batches that are sorted by length together


class PairBatches(Sampler[list[int]]):
    """Indices of every micro-batch of a run, all epochs in one sequence. They depend only on the arguments.

    Pairs of similar length share a micro-batch, so that there is little padding. The order of the micro-batches is
    random. One sequence for all epochs lets a resumed run skip finished micro-batches without replaying random states.
    With n processes, each takes every n-th micro-batch. If they do not divide evenly, some processes get the index
    NO_PAIR_INDEX.
    """

    def __init__(
        self, lengths: Sequence[int], *, size: int, epochs: float, seed: int, rank: int = 0, processes: int = 1
    ):
        per_epoch = math.ceil(len(lengths) / size)
        batches: list[list[int]] = []
        for epoch in range(math.ceil(epochs)):
            rng = random.Random(f"{seed}-{epoch}")
            order = rng.sample(range(len(lengths)), len(lengths))
            pools = [order[i : i + POOL * size] for i in range(0, len(order), POOL * size)]
            pools = [sorted(pool, key=lambda i: lengths[i]) for pool in pools]
            cut = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
            rng.shuffle(cut)
            batches += cut
        batches = batches[: max(1, round(epochs * per_epoch))]
        batches += [[NO_PAIR_INDEX]] * (-len(batches) % processes)
        self.batches = batches[rank::processes]
        self.batch_size = size

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@dataclass
class Collator:
    """Turns encoded pairs into tensors; see `rows` and `shared` for the two layouts.

    For N pairs, `index` and `targets` [2N, R] hold the chosen responses, then the rejected ones: `targets[i, t]` is
    predicted by the hidden state `index[i, t]` of the flattened batch.
    """

    layout: Layout
    pad: int

    def __call__(self, pairs: list[Encoded]) -> dict[str, Tensor]:
        batch = shared(pairs, self.pad) if self.layout == "shared" else rows(pairs, self.pad)
        tokens = [0 if pair is NO_PAIR else pair.tokens for pair in pairs]
        return {**batch, "tokens": torch.tensor(tokens), "margins": torch.tensor([pair.margin for pair in pairs])}


def rows(pairs: list[Encoded], pad: int) -> dict[str, Tensor]:
    """Lay out each response in its own row after its prompt. The last token predicts nothing and is left out."""
    sides = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    inputs = [prompt + response[:-1] for prompt, response in sides]
    width = max(map(len, inputs))
    index = [
        [i * width + len(prompt) - 1 + t for t in range(len(response))] for i, (prompt, response) in enumerate(sides)
    ]
    return {
        "input_ids": _padded(inputs, pad),
        "attention_mask": _padded([[1] * len(ids) for ids in inputs], 0),
        "index": _padded(index, 0),
        "targets": _padded([response for _, response in sides], IGNORE),
    }


def shared(pairs: list[Encoded], pad: int) -> dict[str, Tensor]:
    """Lay out prompt, chosen and rejected response in one row, so that the prompt is computed once.

    A 4-D mask hides the chosen response from the rejected one, and both start at the position after the prompt.
    """
    inputs = [pair.prompt + pair.chosen[:-1] + pair.rejected[:-1] for pair in pairs]
    width = max(map(len, inputs))
    segments, positions, index = [], [], [[], []]  # type: ignore[var-annotated]
    for i, pair in enumerate(pairs):
        n, c, r = len(pair.prompt), len(pair.chosen) - 1, len(pair.rejected) - 1
        segments.append([0] * n + [1] * c + [2] * r)
        positions.append([*range(n), *range(n, n + c), *range(n, n + r)])
        last, first = i * width + n - 1, i * width + n
        index[0].append([last, *range(first, first + c)])
        index[1].append([last, *range(first + c, first + c + r)])
    segment = _padded(segments, 3)
    visible = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    return {
        "input_ids": _padded(inputs, pad),
        "attention_mask": (visible & causal)[:, None],
        "position_ids": _padded(positions, 0),
        "index": _padded(index[0] + index[1], 0),
        "targets": _padded([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], IGNORE),
    }


def _padded(lists: list[list[int]], value: int) -> Tensor:
    width = max(map(len, lists))
    return torch.tensor([row + [value] * (width - len(row)) for row in lists])
