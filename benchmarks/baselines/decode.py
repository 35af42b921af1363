"""The decode loop of the methods that choose one token at a time. Rows share a batch, and ended rows leave it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from baselines.interface import Member, Params, Response, Rows, generators

# Maps (the members' states, one generator per row) to the next token of each row, [R]. It must not advance the states.
Choose = Callable[[list[Rows], list[torch.Generator]], Tensor]


def decode(
    members: Sequence[Member], prompts: Sequence[Sequence[int]], params: Params, choose: Choose
) -> list[Response]:
    """Return a response to each prompt. `choose` picks the next token of every row."""
    if len({member.name for member in members}) < len(members):
        raise ValueError(f"members={[member.name for member in members]}: expected different names")
    states = [member.start(prompts) for member in members]
    noise = generators(len(prompts), params.seed)
    responses = [Response() for _ in prompts]
    rows = list(range(len(prompts)))  # index in `responses` of each row of the batch
    for position in range(params.max_new_tokens):
        tokens = choose(states, [noise[row] for row in rows])
        for row, token in zip(rows, tokens.tolist()):
            responses[row].tokens.append(token)
        last = position + 1 == params.max_new_tokens
        ended = [last or token in params.stop_token_ids for token in tokens.tolist()]
        for i, row in enumerate(rows):
            if ended[i]:
                responses[row].forwards.update({s.member.name: int(s.forwards[i]) for s in states})
        alive = torch.tensor([i for i, end in enumerate(ended) if not end], dtype=torch.int64)
        if not len(alive):
            break
        rows = [rows[i] for i in alive.tolist()]
        for state in states:
            if len(alive) < len(ended):
                state.select(alive)
            state.advance(tokens[alive, None])
    return responses
