"""Sample the guided distribution from raw logits, with one read of every logit.

    c(x) = z_base(x) + Σ_i w_i · z_i(x) + bias(x)               p(x) = exp(c(x) / T) / Σ_y exp(c(y) / T)

Log-normalisers of the members are constant over x and cancel (arXiv 2410.08193, eq. 6), so no log-softmax is needed to
draw a token; they are only computed for the log-probabilities that the caller asks for.

Two-level Gumbel-max over tiles of 1024 tokens, exact because max and sum are associative:

    tile  = argmax_t [ log Σ_{x in tile t} exp(c(x) / T) + G_tile(t) ]
    token = argmax_{x in tile} [ c(x) / T + G_token(x) ]         noise: see philox.py

A token that the base, or an ARM with a non-zero weight, masks with -inf is never drawn, whatever the sign of the
weight. Truncation keeps c(x) ≥ τ: top-k, then top-p on what top-k kept, then min-p; ties at τ are all kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..philox import TILE_LEVEL, TOKEN_LEVEL, gumbel, seed_tensor
from .arguments import OFF, SamplingArguments

TILE = 1024  # part of the random-number contract
ALL_MASKED = 1  # status: no finite maximum; 2 << i: member i (0 is the base) has a NaN or +inf logit
COLDEST = 1e-30  # lower temperatures are raised to it: their inverse would overflow float32


class GuidedSample(NamedTuple):
    """Result of `guided_sample`; R rows, or [R, q] wherever [R] is said.

    tokens: int64 [R], always in range; 0 where status is not 0.
    status: int32 [R], 0 or a sum of 2 << i, for a NaN or +inf in member i (0 is the base), or else ALL_MASKED: every
        token is masked, or weights or bias are not finite. Log-probabilities of such a row are NaN.
    logprobs: float32 [R], log p(token) before truncation, at T = 1 for greedy rows.
    member_logprobs: float32 [1 + m, R], each member's own log-probability of the token: base, then the ARMs' rewards.
    top_tokens, top_logprobs: int64 and float32 [R, n], the n most probable tokens under the same distribution.
    """

    tokens: Tensor
    status: Tensor
    logprobs: Tensor | None = None
    member_logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None


def specification(arguments: SamplingArguments) -> GuidedSample:
    """The specification of `guided_sample`, for checked arguments: float32, or float64 throughout for such a base."""
    base, logit_bias, vocab_size = arguments.base_logits, arguments.logit_bias, arguments.vocabulary
    shape = base.shape[:-1]
    rows, block = shape.numel(), shape[1] if len(shape) == 2 else 1
    members = [upcast(logits[..., :vocab_size].reshape(rows, vocab_size)) for logits in (base, *arguments.arm_logits)]
    dtype = members[0].dtype

    def per_row(name: str, dtype: torch.dtype) -> Tensor:
        """A parameter, which is a number, [R] or [R, q] → [rows]."""
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
    """(z_base + Σ w_i z_i [rows, V], status int32 [rows]) of members [rows, V] and weights [m] or [rows, m]."""
    combined = upcast(base)
    status = invalid(combined, 0)
    masked = combined == -torch.inf
    for i, arm in enumerate(map(upcast, arms)):
        weight = weights[..., i].unsqueeze(-1)  # [1] or [rows, 1]
        status = status | invalid(arm, i + 1)
        hole = arm == -torch.inf
        masked = masked | (hole & (weight != 0))
        combined = combined + weight * arm.masked_fill(hole, 0.0)  # 0 · -inf and w < 0 would give NaN and +inf
    return combined.masked_fill(masked, -torch.inf), status


def upcast(logits: Tensor) -> Tensor:
    """float64 as it is, everything else in float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def invalid(logits: Tensor, member: int) -> Tensor:
    """Status bit of a member with a NaN or +inf logit, int32 [rows]."""
    return ((logits.isnan() | (logits == torch.inf)).any(-1).to(torch.int32)) << (member + 1)


def threshold(combined: Tensor, coldness: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The lowest combined score that is kept, [rows, 1]; `coldness` = 1 / T is [rows, 1], the filters are [rows]."""
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
    """Two-level Gumbel-max over scores [rows, V] → token ids int64 [rows]."""
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
    """log softmax(logits)[token], float32 [rows]."""
    logits = upcast(logits)
    return (logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)).to(torch.float32)
