"""Best-of-N draws N samples from the base and keeps the one with the highest reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor

from baselines.interface import Member, Params, Response
from baselines.mixture import mixture

Reward = Callable[[list[list[int]]], Tensor]  # maps n whole token sequences to their rewards [n]
Sampler = Callable[[Sequence[Sequence[int]], Params], list[Response]]  # samples row i with the seed params.seed + i
REWARD = "reward"


def best_of_n(
    base: Member | Sampler, reward: Reward, n: int, prompts: Sequence[Sequence[int]], params: Params
) -> list[Response]:
    """Return the best of n samples for each prompt; of equal rewards, the first sample.

    base: a model, or a function that samples from one, for example through an engine.
    reward: reads each whole response, without its stop token, in one forward.

    Sample j of prompt i has the seed params.seed + j · len(prompts) + i. So sample 0 is the response of plain sampling,
    and the samples of a larger n begin with the samples of a smaller n.
    """
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
    """Return the tokens of a response without the stop token that ended it, if one did."""
    return tokens[:-1] if tokens and tokens[-1] in params.stop_token_ids else tokens
