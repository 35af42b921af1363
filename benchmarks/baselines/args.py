"""ARGS (arXiv 2402.01694): a trajectory reward model rescores the base's k likeliest tokens at every step.

    s(c) = z(c) + w · r(prefix + c) for c among the k largest logits z; the argmax, or a draw from softmax(s / τ)

r was trained on whole responses, but ARGS asks it about the beginnings of responses: GenARM's paper names this
weakness. The reward model keeps a KV cache, so a step costs it k tokens per row, in one forward. The published code
never ends at the stop token. Here the stop token is an ordinary candidate: its reward is that of the text it ends.
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
    """Return ARGS's response to each prompt. params.temperature is τ; 0 takes the argmax.

    reward: a reward model, made by `interface.reward_member`. weight: w. k: how many candidates a step has.
    """
    if k < 1:
        raise ValueError(f"k={k}: expected at least 1")

    def choose(states: list[Rows], noise: list[torch.Generator]) -> Tensor:
        logits, candidates = states[0].last.topk(k)
        scores = logits + weight * _rewards(states[1], candidates, params)
        picked = draw(scores, params.temperature, noise)
        return candidates.gather(1, picked[:, None]).squeeze(1)

    return decode([base, reward], prompts, params, choose)


def _rewards(state: Rows, candidates: Tensor, params: Params) -> Tensor:
    """Return the reward of each row with each candidate appended, [R, k]. A stop token leaves the reward unchanged."""
    return state.siblings(candidates).where(~is_stop(candidates, params), state.last[:, None])


def is_stop(tokens: Tensor, params: Params) -> Tensor:
    """Whether each token is one of `params.stop_token_ids`, bool of the shape of `tokens`."""
    return torch.isin(tokens, torch.tensor(params.stop_token_ids, dtype=tokens.dtype))
