"""Transfer-Q (arXiv 2405.20495): ARGS, but each candidate is judged by where an aligned policy takes it.

    s(c) = z(c) + w · R(prefix + c + y_c), y_c a greedy rollout of the aligned policy after prefix + c

direct: the policy was aligned to the reward R = r that counts. indirect: it was aligned to another reward r_1, and
the trajectory is reweighted, R = exp(½ (r_2 − r_1)) · r_2 with r_2 the reward that counts, as the published code
does. A step costs k rollouts. Ours keep the caches of prefix and rollout; the published code recomputes both.
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
    """rollout: new tokens of one (20 for direct, 5 for indirect, as published). policys_reward: r_1 of the indirect
    form. Rollouts end at a stop token; rewards are those of the text before it."""
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
    """[R · k, 1 + rollout]: each candidate and what the policy says after it. The rows are left as they were.

    A rollout that has ended goes on beside the others, and is not counted from there on."""
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
    """Rewards [R, k] of the rows with `texts` [R · k, q] behind them, each up to its first stop token."""
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
