"""What the device knows of the sequences of a step: where they are, and by what they are sampled.

Row r of every tensor is sequence r of a `Batch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from genarm_fast.device.base import WorkStream
from genarm_fast.kernels import Settled, settle


def _of(table: Tensor, members: list[int]) -> Tensor:
    """Lines of a table [members, R]. A view where it is one: on a CPU an op whose code left the caches takes 50 µs."""
    return table[members[0]][None] if len(members) == 1 else torch.stack([table[m] for m in members])


class State(NamedTuple):
    """What a step changes, and what it needs to change it. int64 but for `finished`.

    Lengths and limits count tokens of the response.
    """

    last: Tensor  # [members, R], the last token as each member sees it
    starts: Tensor  # [members, R], the position of the last token of the prompt
    lengths: Tensor  # [R]
    limits: Tensor  # [R]
    finished: Tensor  # bool [R]
    stop_ids: Tensor  # [R, S], padded with -1
    texts: Tensor  # [R, H], prompt and response as the base sees them; H is 0 where nobody drafts from them

    def tokens(self, members: list[int]) -> Tensor:
        """The last token of each sequence as these members see it, int64 [L, R, 1]."""
        return _of(self.last, members)[..., None]

    def positions(self, members: list[int]) -> Tensor:
        """Where these members see the last tokens, int64 [L, R, 1]."""
        return (_of(self.starts, members) + self.lengths)[..., None]

    def response_positions(self, width: int) -> Tensor:
        """Index in the response of the next `width` tokens, int64 [R, width]."""
        if width == 1:
            return self.lengths[:, None]
        return self.lengths[:, None] + torch.arange(width, device=self.lengths.device)

    def text_lengths(self) -> Tensor:
        """Of `texts`, int64 [R]."""
        return self.starts[0] + 1 + self.lengths

    def accept(self, targets: Tensor, drafts: Tensor, draft_counts: Tensor | None = None) -> tuple[State, Settled]:
        """Accept the drafts [R, q - 1] that equal their targets [R, q] and one target more; the next step's state.

        It has the `texts` of this one, where the targets stand now. This is the only place where drafts are judged.
        draft_counts: drafts of each row, int64 [R]; None: q - 1.
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
        last = each[None] if count == 1 else each.repeat(count, 1)  # a graph writes there: no number stands for two
        if self.texts.shape[1]:  # tokens that are not accepted lie behind the text, and the next ones over them
            places = self.text_lengths()[:, None] + torch.arange(targets.shape[1], device=targets.device)
            self.texts.scatter_(1, places, targets)
        return self._replace(last=last, lengths=settled.lengths, finished=settled.finished), settled


@dataclass
class SamplingTensors:
    """What `guided_sample` takes for the rows, on one stream.

    weights: float32 [R, S, 1 + m] of the members that run, base first, for the first S tokens of the response; the last
    of them hold for all that follow. parameters: temperature, seeds, and of the filters those that any
    sequence uses: an unused filter costs a kernel nothing if it is not passed.
    """

    weights: Tensor
    parameters: dict[str, Tensor]
    _sharpened: dict[WorkStream, dict[str, Tensor]] = field(default_factory=dict)

    def at(self, positions: Tensor) -> Tensor:
        """Weights at positions [R, q] of the responses: float32 [R, 1 + m] if q or S is 1, else [R, q, 1 + m]."""
        table = self.weights
        if table.shape[1] == 1:
            return table[:, 0]
        index = positions.clamp_max(table.shape[1] - 1)[..., None]
        weights = table.gather(1, index.expand(*positions.shape, table.shape[2]))
        return weights[:, 0] if positions.shape[1] == 1 else weights

    def sharpened(self, positions: Tensor, stream: WorkStream) -> dict[str, Tensor]:
        """The parameters with the temperature at positions [R, 1] divided by the sum of the weights.

        A sum of 0 or less counts as 1. Where weights are the same at all positions, this is computed once.
        """
        if stream in self._sharpened:
            return self._sharpened[stream]
        total = self.at(positions).sum(1)
        found = self.parameters | {"temperature": self.parameters["temperature"] / torch.where(total > 0, total, 1.0)}
        if self.weights.shape[1] == 1:
            self._sharpened[stream] = found
        return found
