"""Transfer-Q (arXiv 2405.20495): ARGS, but each candidate is judged by an aligned policy's continuation of it.

    s(c) = z(c) + w · R(prefix + c + y_c), y_c a greedy rollout of the aligned policy after prefix + c

In the direct form, the policy was aligned to the target reward r, and R = r. In the indirect form, it was aligned to
another reward r_1. There R = exp(½ (r_2 − r_1)) · r_2, as in the published code, and r_2 is the target reward. A step
costs k rollouts. This file keeps the KV caches of prefix and rollout; the published code recomputes both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baselines.args import is_stop
from baselines.decode import decode
from baselines.interface import Member, Params, Response, Rows, draw


def transfer_q(
    base: Member,
    policy: Member,
    reward: Member,
    prompts: Sequence[Sequence[int]],
    params: Params,
    *,
    policys_reward: Member | None = None,
    weight: float = 1.0,
    k: int = 10,
    rollout: int = 20,
) -> list[Response]:
    """Return Transfer-Q's response to each prompt.

    reward: the target reward. policys_reward: r_1 of the indirect form; None selects the direct form. rollout: new
    tokens of a rollout; the published code has 20 in the direct form, 5 in the indirect one. A rollout ends at a stop
    token, and its reward is that of the text before the stop token.
    """
    for name, value in (("k", k), ("rollout", rollout)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    rewards = [reward] if policys_reward is None else [reward, policys_reward]

    def choose(states: list[Rows], noise: list[torch.Generator]) -> Tensor:
        logits, candidates = states[0].last.topk(k)
        texts = _rollouts(states[1], candidates, rollout, params)
        found = [_rewards(state, texts, k, params) for state in states[2:]]
        value = found[0] if len(found) == 1 else (0.5 * (found[0] - found[1])).exp() * found[0]
        picked = draw(logits + weight * value, params.temperature, noise)
        return candidates.gather(1, picked[:, None]).squeeze(1)

    return decode([base, policy, *rewards], prompts, params, choose)


def _rollouts(state: Rows, candidates: Tensor, rollout: int, params: Params) -> Tensor:
    """Return each candidate with the policy's rollout after it, [R · k, 1 + rollout]. `state` does not change.

    A rollout that has ended runs on beside the others, but its further forwards are not counted."""
    rows, k = candidates.shape
    before, counted = state.last, state.forwards.clone()
    state.repeat(k)
    texts = [candidates.reshape(-1)]
    ended = is_stop(texts[0], params)
    for _ in range(rollout):
        counted += (~ended).view(rows, k).sum(1)
        texts.append(state.advance(texts[-1][:, None])[:, -1].argmax(-1))
        ended = ended | is_stop(texts[-1], params)
    state.forget(rollout)
    state.select(torch.arange(rows) * k)
    state.last, state.forwards = before, counted
    return torch.stack(texts, 1)


def _rewards(state: Rows, texts: Tensor, k: int, params: Params) -> Tensor:
    """Return the rewards [R, k] of the rows with `texts` [R · k, q] appended, each cut before its first stop token."""
    rows, before = len(state.last), state.last
    lengths = (is_stop(texts, params).cumsum(1) == 0).sum(1)
    state.repeat(k)
    found = state.advance(texts)
    state.forget(texts.shape[1])
    state.select(torch.arange(rows) * k)
    state.forwards += k - 1
    state.last = before
    each = torch.cat([before.repeat_interleave(k)[:, None], found], 1).gather(1, lengths[:, None])
    return each.view(rows, k)
