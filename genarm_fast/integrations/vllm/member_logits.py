"""Logits of all members for the rows of a step, before they are combined."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from genarm_fast.kernels.guided_sample.reference import combine


@dataclass(frozen=True)
class MemberLogits:
    """The members' logits, which `guided_sample` reads in one pass. No combined tensor is written and read again.

    It takes the place of vLLM's logits of a step. vLLM's samplers ask for a shape and slices of rows, as long as no
    processor, grammar or log-probability reads the rows; any other use as a tensor raises.

    base, arms: [N, V] each, of any dtype; widths may differ. weights: float32 [N, m], in the order of `arms`. own:
    float32 [N], 0 in rows that leave the base out, else 1. Only `combined` reads it. vocab_size: number of token ids
    that all members share.
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
        """Return the combined logits, float32 [N, V] of the base's width, with -inf beyond the common vocabulary.

        rewards: whether a row may leave the base out. This costs a pass over the base's logits.
        """
        size = self.vocab_size
        base = self.base[:, :size]
        if rewards:
            base = base.masked_fill((self.own == 0)[:, None], 0.0)
        found, _ = combine(base, [each[:, :size] for each in self.arms], self.weights)
        return nn.functional.pad(found, (0, self.base.shape[-1] - size), value=-torch.inf)
