"""Tensors of a step's sequences on the device: their state, and their sampling parameters.

Row r of every tensor belongs to sequence r of a `Batch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from genarm_fast.device.base import WorkStream
from genarm_fast.kernels import Settled, settle


def _of(table: Tensor, members: list[int]) -> Tensor:
    """Return these members' lines of a table [members, R], as a view for one member.

    The view saves an op, which takes 50 µs on a CPU if its code has left the processor's caches.
    """
    return table[members[0]][None] if len(members) == 1 else torch.stack([table[m] for m in members])


class State(NamedTuple):
    """The state of a step's sequences: the tensors that a step changes, and those that decide how. int64 or bool.

    Lengths and limits count tokens of the response.
    """

    last: Tensor  # [members, R], the last token as each member sees it
    starts: Tensor  # [members, R], the position of the last token of the prompt
    lengths: Tensor  # [R], tokens of the response so far
    limits: Tensor  # [R], most tokens of the response
    finished: Tensor  # bool [R]
    stop_ids: Tensor  # [R, S], padded with -1
    texts: Tensor  # [R, H], prompt and response as the base sees them; H is 0 if no drafter reads them

    def tokens(self, members: list[int]) -> Tensor:
        """Return the last token of each sequence as these members see it, int64 [L, R, 1]."""
        return _of(self.last, members)[..., None]

    def positions(self, members: list[int]) -> Tensor:
        """Return the positions of the last tokens for these members, int64 [L, R, 1]."""
        return (_of(self.starts, members) + self.lengths)[..., None]

    def response_positions(self, width: int) -> Tensor:
        """Return the indices in the response of the next `width` tokens, int64 [R, width]."""
        if width == 1:
            return self.lengths[:, None]
        return self.lengths[:, None] + torch.arange(width, device=self.lengths.device)

    def text_lengths(self) -> Tensor:
        """Return the lengths of `texts`, int64 [R]."""
        return self.starts[0] + 1 + self.lengths

    def accept(self, targets: Tensor, drafts: Tensor, draft_counts: Tensor | None = None) -> tuple[State, Settled]:
        """Accept drafts [R, q - 1] as far as they equal the targets [R, q], and one target more.

        Returns the next step's state, and what was settled. Both states share `texts`, which get the targets. This is
        the only place where drafts are judged. draft_counts: drafts of each row, int64 [R]; None for q - 1 in all rows.
        """
        settled = settle(
            targets,
            drafts,
            lengths=self.lengths,
            limits=self.limits,
            finished=self.finished,
            stop_ids=self.stop_ids,
            draft_counts=draft_counts,
        )
        each, count = settled.next_tokens, len(self.last)
        last = each[None] if count == 1 else each.repeat(count, 1)  # copies, since a graph writes into this tensor
        if self.texts.shape[1]:  # targets that are not accepted stand after the text, until later ones overwrite them
            places = self.text_lengths()[:, None] + torch.arange(targets.shape[1], device=targets.device)
            self.texts.scatter_(1, places, targets)
        return self._replace(last=last, lengths=settled.lengths, finished=settled.finished), settled


@dataclass
class SamplingTensors:
    """Arguments of `guided_sample` for all rows, on one stream.

    weights: float32 [R, S, 1 + m], the weights of the members that run, base first, for the first S tokens of the
    response; the last of the S counts for all that follow. parameters: temperature, seeds, and the filters that any
    sequence uses. Unused filters are left out, so that the kernel spends no time on them.
    """

    weights: Tensor
    parameters: dict[str, Tensor]
    _sharpened: dict[WorkStream, dict[str, Tensor]] = field(default_factory=dict)

    def at(self, positions: Tensor) -> Tensor:
        """Return the weights at positions [R, q] of the responses.

        They are float32 [R, 1 + m] if q or S is 1, else [R, q, 1 + m].
        """
        table = self.weights
        if table.shape[1] == 1:
            return table[:, 0]
        index = positions.clamp_max(table.shape[1] - 1)[..., None]
        weights = table.gather(1, index.expand(*positions.shape, table.shape[2]))
        return weights[:, 0] if positions.shape[1] == 1 else weights

    def sharpened(self, positions: Tensor, stream: WorkStream) -> dict[str, Tensor]:
        """Return the parameters with the temperature divided by the sum of the weights at positions [R, 1].

        A sum of 0 or less counts as 1. If weights are the same at all positions, the result is computed once.
        """
        if stream in self._sharpened:
            return self._sharpened[stream]
        total = self.at(positions).sum(1)
        found = self.parameters | {"temperature": self.parameters["temperature"] / torch.where(total > 0, total, 1.0)}
        if self.weights.shape[1] == 1:
            self._sharpened[stream] = found
        return found
