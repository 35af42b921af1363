"""Proxy-tuning and emulated fine-tuning add to a large model what tuning changed in a small one.

    proxy-tuning (arXiv 2401.08565):            z_base + α (z_tuned − z_untuned)
    emulated fine-tuning (arXiv 2310.12962):    log π_base + (log π_tuned − log π_untuned) / β'

Both give the same distribution for α = 1/β', since the normalisers cancel. In this library either method is two ARMs
with weights +α and −α.
"""

from __future__ import annotations

from collections.abc import Sequence

from baselines.interface import Member, Params, Response
from baselines.mixture import mixture


def proxy_tuning(
    base: Member, tuned: Member, untuned: Member, alpha: float, prompts: Sequence[Sequence[int]], params: Params
) -> list[Response]:
    return mixture([base, tuned, untuned], [1.0, alpha, -alpha], prompts, params)


def emulated_fine_tuning(
    base: Member, tuned: Member, untuned: Member, beta: float, prompts: Sequence[Sequence[int]], params: Params
) -> list[Response]:
    """Return a response to each prompt. beta: β' above; 1 adds the tuned change as it is, a smaller value adds more."""
    if beta <= 0:
        raise ValueError(f"beta={beta}: expected a number above 0")
    return proxy_tuning(base, tuned, untuned, 1 / beta, prompts, params)
