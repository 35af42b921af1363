"""Plain decoding from a product of models: p(x) ∝ exp(Σ_i c_i log π_i(x) / T).

Coefficients (1, w_1, ..., w_m) give GenARM. This is the engine's slow counterpart: it runs the models one after the
other, takes a log-softmax of each, and has neither drafts nor shared weights. The published code runs as many forwards.
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
    """Return a sample of p for each prompt. All members' logits are cut to the narrowest vocabulary among them."""
    if len(members) != len(coefficients):
        raise ValueError(f"coefficients={list(coefficients)}: expected one for each of {len(members)} members")

    def choose(states: list[Rows], noise: list[torch.Generator]) -> Tensor:
        width = min(state.last.shape[-1] for state in states)
        logprobs = [state.last[:, :width].log_softmax(-1) for state in states]
        scores = torch.stack([c * each for c, each in zip(coefficients, logprobs)]).sum(0)
        return draw(scores, params.temperature, noise)

    return decode(members, prompts, params, choose)
