"""ARGS (arXiv 2402.01694): the base's k likeliest tokens, rescored by a trajectory reward model at every step.

    s(c) = z(c) + w · r(prefix + c) for c among the k largest logits z; the argmax, or a draw from softmax(s / τ)

r was trained on whole responses and is asked about beginnings of them: the weakness that GenARM's paper names. The
reward model keeps a cache, so that a step costs it k tokens a row, in one forward. The published code never ends at the
stop token; here it is a candidate like any other, whose reward is that of the text it ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baselines.decode import decode
from baselines.interface import Member, Params, Response, Rows, draw


def args(
    base: Member,
    reward: Member,
    prompts: Sequence[Sequence[int]],
    params: Params,
    *,
    weight: float = 1.0,
    k: int = 10,
) -> list[Response]:
    """params.temperature is τ, and 0 the greedy form. reward: see `interface.reward_member`."""
    if k < 1:
        raise ValueError(f"k={k}: expected at least 1")

    def choose(states: list[Rows], noise: list[torch.Generator]) -> Tensor:
        logits, candidates = states[0].last.topk(k)
        scores = logits + weight * _rewards(states[1], candidates, params)
        picked = draw(scores, params.temperature, noise)
        return candidates.gather(1, picked[:, None]).squeeze(1)

    return decode([base, reward], prompts, params, choose)


def _rewards(state: Rows, candidates: Tensor, params: Params) -> Tensor:
    """Rewards [R, k] of each row with each candidate behind it."""
    return state.siblings(candidates).where(~is_stop(candidates, params), state.last[:, None])


def is_stop(tokens: Tensor, params: Params) -> Tensor:
    return torch.isin(tokens, torch.tensor(params.stop_token_ids, dtype=tokens.dtype))
