"""Best-of-N: N samples of the base, of which the one with the highest reward is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor

from baselines.interface import Member, Params, Response
from baselines.mixture import mixture

Reward = Callable[[list[list[int]]], Tensor]  # rewards [n] of whole token sequences
REWARD = "reward"


def best_of_n(base: Member, reward: Reward, n: int, prompts: Sequence[Sequence[int]], params: Params) -> list[Response]:
    """The first of equal ones. Sample j of prompt i has the seed params.seed + n · i + j. The reward model reads whole
    responses without the token that ended them, in one forward each."""
    if n < 1:
        raise ValueError(f"n={n}: expected at least 1")
    samples = mixture([base], [1.0], [prompt for prompt in prompts for _ in range(n)], params)
    best = []
    for i, prompt in enumerate(prompts):
        mine = samples[n * i : n * (i + 1)]
        forwards = sum((each.forwards for each in mine), Counter({REWARD: n}))
        rewards = reward([[*prompt, *without_stop(each.tokens, params)] for each in mine])
        best.append(Response(mine[int(rewards.argmax())].tokens, forwards))
    return best


def without_stop(tokens: list[int], params: Params) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] in params.stop_token_ids else tokens
