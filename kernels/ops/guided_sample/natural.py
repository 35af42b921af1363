"""Short forms of a call of guided_sample, for people's own loops: one row, one ARM, one weight, no seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import GuidedSample


class Arranged(NamedTuple):
    """Arguments in the form that all implementations take. one: the logits were [V], without an axis for rows."""

    base_logits: Tensor
    arm_logits: Sequence[Tensor]
    weights: Any
    seeds: Any
    positions: Any
    one: bool


def arranged(
    base: Any, arms: Any, weights: Any, seeds: Any, positions: Any, generator: torch.Generator | None
) -> Arranged:
    """Bring the arguments into the form that all implementations take.

    Logits [V] get an axis for rows. A tensor of several ARMs is taken apart. One weight becomes a weight for each ARM.
    Missing seeds are drawn, one for each row.

    Raises:
        ValueError: a base [V] with an ARM that is not [V].
        TypeError: seeds without positions, whose noise would be the same at every step; seeds and a generator.
    """
    if not isinstance(base, Tensor):
        raise TypeError(f"base_logits of {type(base)}: expected a tensor")
    if isinstance(arms, Tensor):
        arms = arms.unbind(0) if arms.ndim == base.ndim + 1 else (arms,)
    if isinstance(weights, (int, float)) or (isinstance(weights, Tensor) and not weights.ndim):
        weights = [weights] * len(arms) if not isinstance(weights, Tensor) else weights.expand(len(arms))
    one = base.ndim == 1
    if one:
        for i, each in enumerate(arms):
            if not isinstance(each, Tensor) or each.ndim != 1:
                found = f"of shape {tuple(each.shape)}" if isinstance(each, Tensor) else f"of {type(each)}"
                raise ValueError(f"arm_logits[{i}] {found}: expected a tensor [V], as base_logits")
        base, arms = base[None], tuple(each[None] for each in arms)
    if seeds is None:
        device = base.device if generator is None else generator.device
        seeds = torch.randint(2**63 - 1, base.shape[:1], generator=generator, device=device).to(base.device)
        positions = 0 if positions is None else positions
    elif generator is not None:
        raise TypeError("generator: expected none where seeds are given")
    elif positions is None:
        raise TypeError("positions: expected with seeds, or every step would draw with the same noise")
    return Arranged(base, arms, weights, seeds, positions, one)


def first(drawn: GuidedSample) -> GuidedSample:
    """Return the result of a single row without the axis for rows."""
    members = drawn.member_logprobs  # [1 + m, R]
    fields: list[Any] = [None if field is None else field[0] for field in drawn]
    row = GuidedSample(*fields)
    return row if members is None else row._replace(member_logprobs=members[:, 0])
