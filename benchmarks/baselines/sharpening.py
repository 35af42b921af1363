"""The control of every comparison: the base takes the place of its own ARM.

Guidance multiplies distributions. So an ARM equal to the base, which prefers nothing, still sharpens the text:
p ∝ π_base^((1 + w) / T). A judge may like sharper text better, which is no merit of an ARM. The base alone at
temperature T / (1 + w) has exactly this distribution.
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
