"""Multi-objective decoding (MOD, arXiv 2406.18853): p ∝ Π_i π_i^{w_i}, each policy π_i trained for one objective.

The weights sum to 1, and each policy is a full model aligned by DPO. GenARM, in contrast, keeps the base in the
product, and its ARMs are trained without a reference model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from baselines.interface import Member, Params, Response
from baselines.mixture import mixture


def mod(
    policies: Sequence[Member], weights: Sequence[float], prompts: Sequence[Sequence[int]], params: Params
) -> list[Response]:
    """Return a sample of p for each prompt. Policies of weight 0 are not run."""
    if any(weight < 0 for weight in weights) or not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise ValueError(f"weights={list(weights)}: expected numbers of at least 0 that sum to 1")
    if len(policies) != len(weights):
        raise ValueError(f"weights={list(weights)}: expected one for each of {len(policies)} policies")
    used = [(policy, weight) for policy, weight in zip(policies, weights) if weight]
    return mixture([policy for policy, _ in used], [weight for _, weight in used], prompts, params)
