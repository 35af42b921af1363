"""Sample the guided distribution from raw logits, with one read of every logit.

    c(x) = z_base(x) + Σ_i w_i · z_i(x) + bias(x)               p(x) = exp(c(x) / T) / Σ_y exp(c(y) / T)

Log-normalisers of the members are constant over x and cancel (arXiv 2410.08193, eq. 6). So a draw needs no log-softmax.
Log-normalisers are only computed for log-probabilities that the caller asks for.

Tokens are drawn by two-level Gumbel-max over tiles of 1024 tokens. It is exact, because max and sum are associative:

    tile  = argmax_t [ log Σ_{x in tile t} exp(c(x) / T) + G_tile(t) ]
    token = argmax_{x in tile} [ c(x) / T + G_token(x) ]         noise: see philox.py

A token that the base, or an ARM with a non-zero weight, masks with -inf is never drawn, whatever the sign of the
weight. Truncation keeps the tokens with c(x) ≥ τ, and so all ties at τ. It applies top-k, then top-p to the tokens that
top-k kept, then min-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..philox import TILE_LEVEL, TOKEN_LEVEL, gumbel, seed_tensor
from .arguments import OFF, SamplingArguments

TILE = 1024  # part of the random-number contract
ALL_MASKED = 1  # status if the scores have no finite maximum; a bad logit of member i (0 is the base) gives 2 << i
COLDEST = 1e-30  # Lower temperatures above 0 count as this one: their inverse would overflow float32.


class GuidedSample(NamedTuple):
    """Result of `guided_sample` for R rows. For logits [R, q, V], [R, q] takes the place of [R].

    tokens: int64 [R], always a valid id; 0 where status is not 0.
    status: int32 [R], 0 for a good row. Else the sum of 2 << i for each member i (0 is the base) that has a NaN or
        +inf. Without such a member ALL_MASKED: every token is masked, or weights or bias are not finite. The
        log-probabilities of a row with a status are NaN.
    logprobs: float32 [R], log p(token) before truncation, at T = 1 for greedy rows.
    member_logprobs: float32 [1 + m, R], each member's own log-probability of the token: the base's, then the ARMs'
        rewards.
    top_tokens, top_logprobs: int64 and float32 [R, n], the n most probable tokens under the distribution of logprobs.
    """

    tokens: Tensor
    status: Tensor
    logprobs: Tensor | None = None
    member_logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None


def specification(arguments: SamplingArguments) -> GuidedSample:
    """The specification of `guided_sample`, for checked arguments. It computes in float64 for a float64 base only."""
    base, logit_bias, vocab_size = arguments.base_logits, arguments.logit_bias, arguments.vocabulary
    shape = base.shape[:-1]
    rows, block = shape.numel(), shape[1] if len(shape) == 2 else 1
    members = [upcast(logits[..., :vocab_size].reshape(rows, vocab_size)) for logits in (base, *arguments.arm_logits)]
    dtype = members[0].dtype

    def per_row(name: str, dtype: torch.dtype) -> Tensor:
        """Return a parameter [rows], one value for each row and position. It is a number, [R] or [R, q] before."""
        value = getattr(arguments, name)
        value = torch.as_tensor(OFF[name] if value is None else value, dtype=dtype, device=base.device)
        if value.ndim and value.ndim < len(shape):
            value = value.unsqueeze(-1)
        return value.expand(shape).reshape(rows)

    weights = torch.as_tensor(arguments.weights, dtype=dtype, device=base.device)
    if weights.ndim == 2:
        weights = weights.repeat_interleave(block, dim=0)

    combined, status = combine(members[0], members[1:], weights)
    if logit_bias is not None:
        bias = logit_bias[..., :vocab_size].to(dtype)
        combined = combined + (bias.repeat_interleave(block, dim=0) if bias.ndim == 2 else bias)
    status = torch.where((status == 0) & ~combined.amax(-1).isfinite(), ALL_MASKED, status)
    failed = status != 0
    combined = combined.masked_fill(failed[:, None], 0.0)

    temperature = per_row("temperature", dtype)
    greedy = temperature == 0
    coldness = torch.where(greedy, 1.0, 1 / temperature.clamp_min(COLDEST))[:, None]
    scores = (combined - combined.amax(-1, keepdim=True)) * coldness
    filters = per_row("top_k", torch.int64), per_row("top_p", dtype), per_row("min_p", dtype).clamp_max(1)
    kept = scores.masked_fill(combined < threshold(combined, coldness, *filters), -torch.inf)
    if not isinstance(arguments.seeds, Tensor):
        arguments = arguments._replace(seeds=int(seed_tensor([int(arguments.seeds)], "cpu")))
    sampled = sample_tiles(kept, per_row("seeds", torch.int64), per_row("positions", torch.int64))
    tokens = torch.where(greedy, combined.argmax(-1), sampled).masked_fill(failed, 0)

    result: dict[str, Tensor] = {}
    top_logprobs = arguments.top_logprobs
    if arguments.return_logprobs or top_logprobs:
        logprobs = scores.log_softmax(-1).to(torch.float32).masked_fill(failed[:, None], torch.nan)
        result["logprobs"] = logprobs.gather(-1, tokens[:, None]).reshape(shape)
        rewards = torch.stack([member_logprob(logits, tokens) for logits in members]).masked_fill(failed, torch.nan)
        result["member_logprobs"] = rewards.reshape(len(members), *shape)
    if top_logprobs:
        top = combined.sort(dim=-1, descending=True, stable=True).indices[:, :top_logprobs]  # ties: lowest id first
        result["top_tokens"] = top.reshape(*shape, top_logprobs)
        result["top_logprobs"] = logprobs.gather(-1, top).reshape(*shape, top_logprobs)
    return GuidedSample(tokens.reshape(shape), status.reshape(shape), **result)


def combine(base: Tensor, arms: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return z_base + Σ w_i z_i, [rows, V], and the status, int32 [rows]. weights: [m] or [rows, m]."""
    combined = upcast(base)
    status = invalid(combined, 0)
    masked = combined == -torch.inf
    for i, arm in enumerate(map(upcast, arms)):
        weight = weights[..., i].unsqueeze(-1)  # [1] or [rows, 1]
        status = status | invalid(arm, i + 1)
        hole = arm == -torch.inf
        masked = masked | (hole & (weight != 0))
        combined = combined + weight * arm.masked_fill(hole, 0.0)  # -inf would give NaN for w = 0, and +inf for w < 0
    return combined.masked_fill(masked, -torch.inf), status


def upcast(logits: Tensor) -> Tensor:
    """Return float64 logits unchanged, and others in float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def invalid(logits: Tensor, member: int) -> Tensor:
    """Return the status bit of each row in which this member has a NaN or +inf logit, else 0: int32 [rows]."""
    return ((logits.isnan() | (logits == torch.inf)).any(-1).to(torch.int32)) << (member + 1)


def threshold(combined: Tensor, coldness: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Return the lowest combined score that the filters [rows] keep, [rows, 1]. coldness: 1 / T, [rows, 1]."""
    vocab_size = combined.shape[-1]
    peak = combined.amax(-1, keepdim=True)
    lowest = peak + min_p[:, None].log() / coldness
    limited = (top_k > 0) & (top_k < vocab_size)
    if bool((limited | (top_p < 1)).any()):
        ordered = combined.sort(dim=-1, descending=True).values
        last = torch.where(limited, top_k, vocab_size)[:, None] - 1
        kth = ordered.gather(-1, last)
        scores = ((ordered - peak) * coldness).masked_fill(ordered < kth, -torch.inf)
        last_p = (scores.softmax(-1).cumsum(-1) < top_p[:, None]).sum(-1, keepdim=True).clamp_max(vocab_size - 1)
        nucleus = torch.where(top_p[:, None] < 1, ordered.gather(-1, last_p), -torch.inf)
        lowest = torch.maximum(lowest, torch.maximum(kth, nucleus))
    return lowest


def sample_tiles(scores: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Return token ids, int64 [rows], drawn by two-level Gumbel-max from scores [rows, V]."""
    rows, vocab_size = scores.shape
    tiles = -(-vocab_size // TILE)
    padded = torch.nn.functional.pad(scores, (0, tiles * TILE - vocab_size), value=-torch.inf).view(rows, tiles, TILE)
    index = torch.arange(max(tiles, TILE), device=scores.device)
    seeds, positions = seeds[:, None], positions[:, None]
    tile = (padded.logsumexp(-1) + gumbel(seeds, TILE_LEVEL, positions, index[:tiles])).argmax(-1)
    inside = padded.gather(1, tile[:, None, None].expand(-1, 1, TILE)).squeeze(1)
    tokens = tile[:, None] * TILE + index[:TILE]
    choice = (inside + gumbel(seeds, TOKEN_LEVEL, positions, tokens)).argmax(-1)
    return tile * TILE + choice


def member_logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return log softmax(logits)[token], float32 [rows], of logits [rows, V] and tokens [rows]."""
    logits = upcast(logits)
    return (logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)).to(torch.float32)
