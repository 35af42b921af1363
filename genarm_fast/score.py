"""Teacher-forced scoring: what every member thinks of a given response, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cache import Cache, pad_left
from .members import Member

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}  # logits alive at once: 64 MB and 1 GB in float32


@torch.inference_mode()
def response_logprobs(
    member: Member, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], vocab_size: int
) -> list[list[float]]:
    """log π(token | prompt, earlier tokens) over the first `vocab_size` tokens, for every token of every response.

    Prompts and responses are not empty. Goes through the responses in pieces, so [R, T, V] never exists.
    """
    cache = Cache(member)
    longest = max(map(len, responses))
    tokens, mask = pad_left([[*prompt, *response] for prompt, response in zip(prompts, responses)], cache.device)
    targets = tokens[:, -longest:]
    start = tokens.shape[1] - longest  # predicts the first of `targets`
    limit = CHUNK_ELEMENTS.get(cache.device.type, CHUNK_ELEMENTS["cuda"])
    step = max(1, limit // (len(prompts) * member.vocab_size))
    logprobs: list[Tensor] = []
    done = 0
    while done < longest:
        size = min(step, longest - done)
        first = 0 if done == 0 else start + done - 1
        piece = slice(first, start + done + size - 1)
        logits = cache.forward(tokens[:, piece], mask[:, piece], keep=size)[..., :vocab_size].float()
        labels = targets[:, done : done + size].to(logits.device)[..., None]
        logprobs.append((logits.gather(-1, labels)[..., 0] - logits.logsumexp(-1)).cpu())
        done += size
    table = torch.cat(logprobs, dim=1).tolist()
    return [line[longest - len(response) :] for line, response in zip(table, responses)]
