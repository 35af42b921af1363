"""The loop that methods of one token at a time share: all rows together, ended ones dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from baselines.interface import Member, Params, Response, Rows, generators

# (states of the members, each row's generator) -> next token of each row, [R]. Leaves every state one token behind.
Choose = Callable[[list[Rows], list[torch.Generator]], Tensor]


def decode(
    members: Sequence[Member], prompts: Sequence[Sequence[int]], params: Params, choose: Choose
) -> list[Response]:
    """A response for each prompt; `choose` says which token comes next."""
    if len({member.name for member in members}) < len(members):
        raise ValueError(f"members={[member.name for member in members]}: expected different names")
    states = [member.start(prompts) for member in members]
    noise = generators(len(prompts), params.seed)
    responses = [Response() for _ in prompts]
    rows = list(range(len(prompts)))  # which response each row is
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
