"""Best-of-N: N samples of the base, of which the one with the highest reward is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor

from baselines.interface import Member, Params, Response
from baselines.mixture import mixture

Reward = Callable[[list[list[int]]], Tensor]  # rewards [n] of whole token sequences
Sampler = Callable[[Sequence[Sequence[int]], Params], list[Response]]  # row i with the seed params.seed + i
REWARD = "reward"


def best_of_n(
    base: Member | Sampler, reward: Reward, n: int, prompts: Sequence[Sequence[int]], params: Params
) -> list[Response]:
    """The first of equal ones. base: a model, or what samples from it, as an engine does.

    Sample j of prompt i has the seed params.seed + j · prompts + i: the first is plain sampling's response, and those
    of a larger N begin with those of a smaller one. The reward model reads whole responses without the token that
    ended them, in one forward each."""
    if n < 1:
        raise ValueError(f"n={n}: expected at least 1")
    rows = [prompt for _ in range(n) for prompt in prompts]
    samples = mixture([base], [1.0], rows, params) if isinstance(base, Member) else base(rows, params)
    best = []
    for i, prompt in enumerate(prompts):
        mine = samples[i :: len(prompts)]
        forwards = sum((each.forwards for each in mine), Counter({REWARD: n}))
        rewards = reward([[*prompt, *without_stop(each.tokens, params)] for each in mine])
        best.append(Response(mine[int(rewards.argmax())].tokens, forwards))
    return best


def without_stop(tokens: list[int], params: Params) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] in params.stop_token_ids else tokens
