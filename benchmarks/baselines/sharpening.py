"""The control: the base as its own ARM.

Guidance multiplies distributions, so an ARM that prefers nothing still sharpens: p ∝ π_base^((1 + w) / T). What
sharper text gains with a judge is no credit of an ARM's. One model at temperature T / (1 + w) is that law exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from baselines.interface import Member, Params, Response
from baselines.mixture import mixture


def sharpening(base: Member, weight: float, prompts: Sequence[Sequence[int]], params: Params) -> list[Response]:
    if weight <= -1:
        raise ValueError(f"weight={weight}: expected more than -1, where nothing of the base is left")
    return mixture([base], [1.0], prompts, replace(params, temperature=params.temperature / (1 + weight)))
