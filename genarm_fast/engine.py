"""The decode loop: prefill a batch, then rounds of forward, sample, settle until every row is finished."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .cache import Cache
from .members import Member
from .requests import Row
from .sampling import sample


@torch.inference_mode()
def decode(
    members: Sequence[Member], rows: Sequence[Row], vocab_size: int, *, steered: bool = False
) -> Iterator[list[Row]]:
    """Decode rows as one batch, yielding after each round those that are finished in it.

    Rows are changed in place; one that fails gets its `error` set and ends alone. ARMs that no row weighs or reports
    are left out, unless `steered`: then the caller may change `row.weights` between rounds.
    """
    arms = [
        i
        for i in range(len(members) - 1)
        if steered or any(row.weights[i] != 0 or row.request.params.rewards for row in rows)
    ]
    running = [members[0], *(members[i + 1] for i in arms)]
    names = [member.name for member in running]
    device = members[0].device
    rows = list(rows)
    arrived = time.perf_counter()

    groups = in_one_forward(running)
    caches = [Cache(*(running[i] for i in group)) for group in groups]
    prompts = [tuple(map(tuple, row.request.token_ids)) for row in rows]  # per row, per member
    distinct = list(dict.fromkeys(prompts))  # rows of one prompt share its prefill
    shared = [distinct.index(prompt) for prompt in prompts]
    own = [[prompt[i] for prompt in distinct] for i in (0, *(i + 1 for i in arms))]
    prefills = [cache.prefill([own[i] for i in group]) for group, cache in zip(groups, caches)]
    logits = [each[shared] for each in in_order(groups, prefills)]
    if len(rows) > len(distinct):
        for cache in caches:
            cache.select(shared)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    prefilled = time.perf_counter()
    for row in rows:
        row.arrived, row.prefilled = arrived, prefilled

    while True:
        draws = sample(rows, [each[:, :vocab_size].to(device) for each in logits], arms, names)
        for row, draw in zip(rows, draws):
            if row.error is None:
                row.settle(draw)
        kept = [i for i, row in enumerate(rows) if row.error is None and row.finish_reason is None]
        now = time.perf_counter()
        for row in rows:
            row.finished = now
        yield [row for row in rows if row.error is not None or row.finish_reason is not None]
        if not kept:
            return
        if len(kept) < len(rows):
            rows = [rows[i] for i in kept]
            for cache in caches:
                cache.select(kept)
        tokens = torch.tensor([row.tokens[-1] for row in rows])
        logits = in_order(groups, [cache.decode(tokens) for cache in caches])


def in_one_forward(members: Sequence[Member]) -> list[list[int]]:
    """Indices of the members, those that share a forward together."""
    groups: dict[int, list[int]] = {}
    for i, member in enumerate(members):
        groups.setdefault(id(member.shared), []).append(i)
    return list(groups.values())


def in_order(groups: Sequence[Sequence[int]], results: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Each member's result, from those of each group."""
    by_member = {i: result for group, each in zip(groups, results) for i, result in zip(group, each)}
    return [by_member[i] for i in range(len(by_member))]
