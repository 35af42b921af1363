"""Teacher-forced scoring: every member's log-probabilities of given responses, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from genarm_fast.engine.model_runner import ModelRunner, in_one_forward, padded
from genarm_fast.engine.scheduler import CHUNK_TOKENS
from genarm_fast.engine.selfcheck import entries_of, token_bytes
from genarm_fast.models.member import Member
from genarm_fast.outputs import ArmRewards, ScoreOutput
from genarm_fast.text.given import Prompt, as_responses
from genarm_fast.text.prompts import check_context, encode_prompt, encode_response

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}  # most logits in memory at once: 64 MB and 1 GB in float32


def score_responses(
    members: Sequence[Member],
    prompts: Sequence[Prompt],
    responses: Any,
    *,
    append_eos: bool,
    vocab_size: int,
    eos_token_ids: frozenset[int],
    max_batch_size: int,
    cache_bytes: int | None,
) -> list[ScoreOutput]:
    """Score responses as `GenARM.score` does, by these members, base first."""
    answers = as_responses(responses, len(prompts))
    targets = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        if isinstance(answer, str):
            ids = encode_response(members[0], prompt, answer, eos_token_ids, append_end=append_eos)
        else:
            ids = answer
        check_response_ids(i, answer, ids, vocab_size)
        targets.append(ids)
    encoded = [[encode_prompt(member, prompt, i, vocab_size) for member in members] for i, prompt in enumerate(prompts)]
    for i, (prompt_ids, target) in enumerate(zip(encoded, targets)):
        for member, ids in zip(members, prompt_ids):
            check_context(member, len(ids), len(target), i)
    logprobs: list[list[list[float]]] = [[] for _ in prompts]
    lengths = [max(map(len, ids)) for ids in encoded], [*map(len, targets)]
    for batch in list(batches(members, *lengths, max_batch_size, cache_bytes)):
        lines = response_logprobs(members, [encoded[i] for i in batch], [targets[i] for i in batch], vocab_size)
        for i, line in zip(batch, lines):
            for member, values in zip(members, line):
                if (at := next((t for t, value in enumerate(values) if math.isnan(value)), None)) is not None:
                    raise RuntimeError(f"responses[{i}]: NaN or +inf logits from {member.name} at token {at}")
            logprobs[i] = line
    names = [member.name for member in members[1:]]
    return [
        ScoreOutput(prompt, answer, target, line[0], {name: ArmRewards(own) for name, own in zip(names, line[1:])})
        for prompt, answer, target, line in zip(prompts, answers, targets, logprobs)
    ]


def check_response_ids(index: int, response: str | list[int], ids: list[int], vocab_size: int) -> None:
    """Raise ValueError for a response without tokens, or with ids outside the vocabulary."""
    if not ids:
        raise ValueError(f"responses[{index}]={response!r}: expected at least one token")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise ValueError(f"responses[{index}]: token ids {min(ids)}..{max(ids)}: expected 0..{vocab_size - 1}")


def batches(
    members: Sequence[Member],
    prompts: Sequence[int],
    responses: Sequence[int],
    rows: int,
    cache_bytes: int | None,
) -> Iterator[list[int]]:
    """Iterate over batches: lists of indices of responses that are scored together, in the order of their lengths.

    prompts: each prompt's number of tokens, for the member for which it is largest. responses: each response's number
    of tokens. rows: most responses in a batch. cache_bytes: most bytes that the caches of a batch take, for one model
    runner at a time.

    Raises:
        MemoryError: a response does not fit alone.
    """
    token = max(token_bytes([members[i] for i in group]) for group in in_one_forward(members))

    def takes(indices: Sequence[int]) -> int:
        longest = max(prompts[i] for i in indices) + max(responses[i] for i in indices)
        return len(indices) * longest * token

    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: prompts[i] + responses[i]):
        if cache_bytes is not None and takes([i]) > cache_bytes:
            raise MemoryError(
                f"prompts[{i}]: {prompts[i] + responses[i]} tokens take {takes([i]):,} bytes of cache:"
                f" expected at most cache_bytes={cache_bytes:,}"
            )
        if batch and (len(batch) == rows or (cache_bytes is not None and takes([*batch, i]) > cache_bytes)):
            yield batch
            batch = []
        batch.append(i)
    yield batch


@torch.inference_mode()
def response_logprobs(
    members: Sequence[Member],
    prompts: Sequence[Sequence[list[int]]],
    responses: Sequence[list[int]],
    vocab_size: int,
) -> list[list[list[float]]]:
    """Return log π(token | prompt, earlier tokens) as [response][member][token], over the first `vocab_size` tokens.

    prompts: token ids as [response][member], none empty. responses: token ids, none empty. Logits of all positions,
    [R, T, V], are never in memory at once.
    """
    lines: list[list[list[float]]] = [[[] for _ in members] for _ in responses]
    for group in in_one_forward(members):
        own = [[prompt[i] for prompt in prompts] for i in group]
        for lane, table in zip(group, _lanes([members[i] for i in group], own, responses, vocab_size)):
            for line, response, logprobs in zip(lines, responses, table.tolist()):
                line[lane] = logprobs[: len(response)]
    return lines


def _lanes(
    members: Sequence[Member],
    prompts: Sequence[Sequence[list[int]]],
    responses: Sequence[list[int]],
    vocab_size: int,
) -> Tensor:
    """Return log-probabilities [L, R, longest response] by the L members of one forward.

    Numbers after the end of a response have no meaning.
    """
    longest = max(map(len, responses))
    lengths = torch.tensor([[len(prompt) for prompt in lane] for lane in prompts])
    rows = range(len(responses))
    lanes = range(len(members))
    runner = ModelRunner(members)
    runner.refresh()
    runner.reserve(entries_of(members), lanes, len(rows), int(lengths.max()) + longest)
    step = max(1, CHUNK_TOKENS // len(rows))
    for start in range(0, int(lengths.max()) - 1, step):
        width = min(step, int(lengths.max()) - 1 - start)
        tokens = [[padded(prompt[:-1][start : start + width], width) for prompt in lane] for lane in prompts]
        positions = torch.arange(start, start + width).expand(*lengths.shape, width)
        runner.prefill(torch.tensor(tokens), positions, rows, start + width, lanes)

    targets = torch.tensor([padded(response, longest) for response in responses])
    last = torch.tensor([[[prompt[-1]] for prompt in lane] for lane in prompts])
    inputs = torch.cat([last, targets[:, :-1].expand(len(members), -1, -1)], dim=-1)
    limit = CHUNK_ELEMENTS.get(runner.stream.type, CHUNK_ELEMENTS["cuda"])
    step = max(1, limit // (lengths.numel() * members[0].vocab_size))
    pieces = []
    for start in range(0, longest, step):
        piece = inputs[..., start : start + step]
        positions = lengths[..., None] - 1 + start + torch.arange(piece.shape[-1])
        bound = int(positions.max()) + 1
        piece, positions = (each.to(runner.stream) for each in (piece, positions))
        logits = torch.stack(runner.forward(piece, positions, rows, bound, lanes))
        logits = logits[..., :vocab_size].float()
        labels = targets[:, start : start + step].to(logits.device).expand(len(members), -1, -1)[..., None]
        total = logits.logsumexp(-1)
        logprobs = (logits.gather(-1, labels)[..., 0] - total).clamp_max(0.0)
        # Where another token's logit is +inf, the log-probability would be -inf; NaN reports the fault instead.
        pieces.append(logprobs.masked_fill(total == torch.inf, torch.nan).cpu())
    return torch.cat(pieces, dim=-1)
