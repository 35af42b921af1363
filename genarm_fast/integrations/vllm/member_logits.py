"""Logits of all members for the rows of a step, before anything combines them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from genarm_fast.kernels.guided_sample.reference import combine


@dataclass(frozen=True)
class MemberLogits:
    """What `guided_sample` reads in one pass, so that no combined tensor is written for it and read again.

    It stands where vLLM has logits of a step, and has as much of a tensor as vLLM's samplers ask of rows that no
    processor, grammar or log-probability looks at: a shape, and slices of rows. All else raises.

    base, arms: [N, V] each, of any dtype; widths may differ. weights: float32 [N, m], in the order of `arms`.
    own: float32 [N], 0 in rows that leave the base out, which are for `combined` alone; 1 in all others.
    vocab_size: token ids that all members share.
    """

    base: Tensor
    arms: tuple[Tensor, ...]
    weights: Tensor
    own: Tensor
    vocab_size: int

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, rows: slice) -> MemberLogits:
        arms = tuple(each[rows] for each in self.arms)
        return replace(self, base=self.base[rows], arms=arms, weights=self.weights[rows], own=self.own[rows])

    def combined(self, rewards: bool = False) -> Tensor:
        """float32 [N, V] of the base's width; -inf behind the tokens that all members share.

        rewards: whether a row may leave the base out, which costs a pass over its logits.
        """
        size = self.vocab_size
        base = self.base[:, :size]
        if rewards:
            base = base.masked_fill((self.own == 0)[:, None], 0.0)
        found, _ = combine(base, [each[:, :size] for each in self.arms], self.weights)
        return nn.functional.pad(found, (0, self.base.shape[-1] - size), value=-torch.inf)
