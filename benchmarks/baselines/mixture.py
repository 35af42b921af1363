"""Decoding from a product of models, plainly: p(x) ∝ exp(Σ_i c_i log π_i(x) / T).

GenARM itself is coefficients (1, w_1, ..., w_m). This is the slow twin of the engine: every model one after the
other, a log-softmax of each, no drafts, no shared weights. `forwards` of it are what the published code runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baselines.decode import decode
from baselines.interface import Member, Params, Response, Rows, draw


def mixture(
    members: Sequence[Member], coefficients: Sequence[float], prompts: Sequence[Sequence[int]], params: Params
) -> list[Response]:
    """Samples of p. Members are cut to the narrowest vocabulary among them."""
    if len(members) != len(coefficients):
        raise ValueError(f"coefficients={list(coefficients)}: expected one for each of {len(members)} members")

    def choose(states: list[Rows], noise: list[torch.Generator]) -> Tensor:
        width = min(state.last.shape[-1] for state in states)
        logprobs = [state.last[:, :width].log_softmax(-1) for state in states]
        scores = torch.stack([c * each for c, each in zip(coefficients, logprobs)]).sum(0)
        return draw(scores, params.temperature, noise)

    return decode(members, prompts, params, choose)
