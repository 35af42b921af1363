"""One token for every row: the kernel for plain rows, adjusted scores for rows with penalties, bias or processors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels import GuidedSample, guided_sample, seed_tensor
from .kernels.guided_sample import ALL_MASKED, combine, member_logprob
from .requests import Draw, Row


def sample(rows: Sequence[Row], logits: Sequence[Tensor], arms: Sequence[int], names: Sequence[str]) -> list[Draw]:
    """Draw a token for every row.

    logits: one [R, V] per member that ran, cut to the common vocabulary: the base, then the ARMs with indices `arms`.
    names: of those members. A row that cannot be sampled gets its `error` set, and token 0.
    """
    draws: list[Draw] = [Draw(0)] * len(rows)
    plain = [i for i, row in enumerate(rows) if not adjusts(row)]
    adjusted = [i for i, row in enumerate(rows) if adjusts(row)]
    for group in (plain, adjusted):
        if not group:
            continue
        members = list(logits)
        if len(group) < len(rows):
            index = torch.tensor(group, device=logits[0].device)
            members = [member[index] for member in logits]
        chosen = [rows[i] for i in group]
        weights = torch.tensor([[row.weights[arm] for arm in arms] for row in chosen], dtype=torch.float32)
        if group is plain:
            result = _draw(chosen, members[0], members[1:], weights)
        else:
            result = _draw_adjusted(chosen, members, weights.to(members[0].device))
        for i, draw in zip(group, _read(chosen, result, names)):
            draws[i] = draw
    return draws


def adjusts(row: Row) -> bool:
    """Whether the next token's scores are changed between the combination and the temperature."""
    params = row.request.params
    return bool(
        params.repetition_penalty != 1.0
        or params.logit_bias
        or params.logits_processors
        or len(row.tokens) < params.min_new_tokens
    )


def _draw(rows: Sequence[Row], base: Tensor, arms: Sequence[Tensor], weights: Tensor) -> GuidedSample:
    params = [row.request.params for row in rows]
    device = base.device
    return guided_sample(
        base,
        tuple(arms),
        weights.to(device),
        temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
        top_k=torch.tensor([min(p.top_k, base.shape[-1]) for p in params], device=device),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
        min_p=torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device),
        seeds=seed_tensor([row.seed for row in rows], device),
        positions=torch.tensor([len(row.tokens) for row in rows], device=device),
        return_logprobs=any(row.wants_logprobs for row in rows),
        top_logprobs=min(max(p.logprobs or 0 for p in params), base.shape[-1]),
    )


def _draw_adjusted(rows: Sequence[Row], members: Sequence[Tensor], weights: Tensor) -> GuidedSample:
    """Rows whose normalised combined log-probabilities are changed before the temperature."""
    combined, status = combine(members[0], members[1:], weights)
    scores = combined.log_softmax(-1)
    for i, row in enumerate(rows):
        if status[i] == 0:
            try:
                scores[i] = adjust(row, scores[i])
            except Exception as error:  # a caller's processor: this request fails, the others go on
                row.error = error
    result = _draw(rows, scores, (), weights[:, :0])
    result = result._replace(status=torch.where(status != 0, status, result.status & ALL_MASKED))
    if result.logprobs is not None:
        logprobs = torch.stack([member_logprob(member, result.tokens) for member in members])
        result = result._replace(member_logprobs=logprobs)
    return result


def adjust(row: Row, scores: Tensor) -> Tensor:
    """Repetition penalty, logit bias, minimum length, processors, on log-probabilities float32 [V]."""
    params, vocab_size, device = row.request.params, scores.shape[-1], scores.device
    seen = torch.tensor([*row.request.token_ids[0], *row.tokens], device=device)
    if params.repetition_penalty != 1.0:
        known = seen[seen < vocab_size].unique()
        scores[known] *= params.repetition_penalty  # log-probabilities are never positive
    if params.logit_bias:
        index = torch.tensor(list(params.logit_bias), device=device)
        scores[index] += torch.tensor(list(params.logit_bias.values()), dtype=scores.dtype, device=device)
    if len(row.tokens) < params.min_new_tokens:
        scores[[token for token in row.request.stop_ids if token < vocab_size]] = -torch.inf
    for processor in params.logits_processors:
        changed = processor(seen[None], scores[None])
        if not isinstance(changed, Tensor) or changed.shape != (1, vocab_size):
            shape = tuple(changed.shape) if isinstance(changed, Tensor) else changed
            raise ValueError(
                f"logits_processors: {processor!r} returned {shape!r}, expected scores of shape (1, {vocab_size})"
            )
        scores = changed[0].to(device=device, dtype=scores.dtype)
        if bool((scores.isnan() | (scores == torch.inf)).any()):
            raise ValueError(f"logits_processors: {processor!r} returned NaN or +inf, expected finite scores or -inf")
    return scores


def _read(rows: Sequence[Row], result: GuidedSample, names: Sequence[str]) -> list[Draw]:
    """Results as Python values, and errors of rows that could not be sampled."""
    draws = [Draw(token) for token in result.tokens.tolist()]
    if any(row.wants_logprobs for row in rows):
        assert result.logprobs is not None
        assert result.member_logprobs is not None
        for draw, logprob, members in zip(draws, result.logprobs.tolist(), result.member_logprobs.T.tolist()):
            draw.logprob, draw.member_logprobs = logprob, members
    if result.top_tokens is not None and result.top_logprobs is not None:
        for row, draw, top, logprobs in zip(rows, draws, result.top_tokens.tolist(), result.top_logprobs.tolist()):
            count = row.request.params.logprobs or 0
            draw.top = dict(zip(top[:count], logprobs[:count]))
    for row, status in zip(rows, result.status.tolist()):
        if status and row.error is None:
            bad = [name for i, name in enumerate(names) if status >> (i + 1) & 1]
            what = f"NaN or +inf logits from {', '.join(bad)}" if bad else "every token is masked"
            row.error = ValueError(f"{what} at token {len(row.tokens)} of the response")
    return draws
