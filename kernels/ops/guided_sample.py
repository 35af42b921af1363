"""Sample the guided distribution from raw logits, with one read of every logit.

    s(x) = (z_base(x) + Σ_i w_i · z_i(x) + bias(x)) / T          p(x) = exp(s(x)) / Σ_y exp(s(y))

Log-normalisers of the members are constant over x and cancel (arXiv 2410.08193, eq. 6), so no log-softmax is needed to
draw a token; they are only computed for the log-probabilities that the caller asks for.

Two-level Gumbel-max over tiles of 1024 tokens, exact because max and sum are associative:

    tile  = argmax_t [ log Σ_{x in tile t} exp(s(x)) + G_tile(t) ]
    token = argmax_{x in tile} [ s(x) + G_token(x) ]             noise: see philox.py

A token that the base, or an ARM with a non-zero weight, masks with -inf is never drawn, whatever the sign of the
weight. Truncation acts on s: top-k, then top-p on what top-k kept, then min-p; ties at a threshold are all kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .philox import TILE_LEVEL, TOKEN_LEVEL, gumbel

TILE = 1024  # part of the random-number contract
ALL_MASKED = 1  # status bit; bit 1 + i: member i (0 is the base) has a NaN or +inf logit


class GuidedSample(NamedTuple):
    """Result of `guided_sample`; R rows, or [R, q] wherever [R] is said.

    tokens: int64 [R], always in range; 0 where status is not 0.
    status: int32 [R], 0 or a sum of ALL_MASKED and 2 << i for a NaN or +inf in member i (0 is the base).
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


def guided_sample(
    base_logits: Tensor,  # [R, V] or [R, q, V], any float dtype
    arm_logits: Sequence[Tensor],  # m tensors alike; widths and dtypes may differ
    weights: Tensor | Sequence[float],  # [m] or [R, m]
    *,
    temperature: Tensor | float = 1.0,  # scalar or [R]; 0 is greedy
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
    min_p: Tensor | float = 0.0,
    seeds: Tensor | int,  # int64, scalar or [R]; see philox.seed_tensor
    positions: Tensor | int,  # int64, scalar, [R] or [R, q]: index of the token in the response
    vocab_size: int | None = None,
    logit_bias: Tensor | None = None,  # [V] or [R, V]
    return_logprobs: bool = False,
    top_logprobs: int = 0,
) -> GuidedSample:
    """Draw one token per position from the guided distribution.

    Only the first `vocab_size` tokens count (default: the narrowest member). Parameters are scalars or [R] tensors.

    Raises:
        ValueError: shapes that do not fit together, a vocab_size wider than a member, top_logprobs out of range.
    """
    vocab_size = check_shapes(base_logits, arm_logits, vocab_size, top_logprobs)
    shape = base_logits.shape[:-1]
    rows = base_logits.numel() // base_logits.shape[-1]
    device = base_logits.device
    members = [logits[..., :vocab_size].reshape(rows, vocab_size) for logits in (base_logits, *arm_logits)]

    def per_row(value: Tensor | float, dtype: torch.dtype) -> Tensor:
        """Scalar, [R] or [R, q] → [rows]."""
        value = torch.as_tensor(value, dtype=dtype, device=device)
        if value.ndim and value.ndim < len(shape):
            value = value.unsqueeze(-1)
        return value.expand(shape).reshape(rows)

    weights = torch.as_tensor(weights, dtype=torch.float32, device=device)
    if weights.ndim == 2 and len(shape) == 2:
        weights = weights.repeat_interleave(shape[1], dim=0)
    if weights.shape not in ((len(arm_logits),), (rows, len(arm_logits))):
        raise ValueError(f"weights of shape {tuple(weights.shape)}: expected [{len(arm_logits)}] or [R, m], m = ARMs")
    temperature = per_row(temperature, torch.float32)
    positions, seeds = per_row(positions, torch.int64), per_row(seeds, torch.int64)

    scores, status = combine(members[0], members[1:], weights)
    if logit_bias is not None:
        bias = logit_bias[..., :vocab_size].to(scores.dtype)
        scores = scores + (bias.repeat_interleave(rows // bias.shape[0], dim=0) if bias.ndim == 2 else bias)
    status = status | torch.where(scores.amax(-1) == -torch.inf, ALL_MASKED, 0).to(torch.int32)
    scores = scores.masked_fill(status[:, None] != 0, 0.0)

    greedy = temperature == 0
    scores = scores / torch.where(greedy, 1.0, temperature)[:, None]
    kept = truncate(scores, per_row(top_k, torch.int64), per_row(top_p, torch.float32), per_row(min_p, torch.float32))
    tokens = torch.where(greedy, scores.argmax(-1), sample_tiles(kept, seeds, positions)).masked_fill(status != 0, 0)

    result: dict[str, Tensor] = {}
    if return_logprobs or top_logprobs:
        logprobs = scores.log_softmax(-1)
        result["logprobs"] = logprobs.gather(-1, tokens[:, None]).reshape(shape)
        result["member_logprobs"] = torch.stack([member_logprob(logits, tokens) for logits in members]).reshape(
            (len(members), *shape)
        )
        if top_logprobs:
            top = logprobs.topk(top_logprobs, dim=-1)
            result["top_logprobs"] = top.values.reshape((*shape, top_logprobs))
            result["top_tokens"] = top.indices.reshape((*shape, top_logprobs))
    return GuidedSample(tokens.reshape(shape), status.reshape(shape), **result)


def check_shapes(base: Tensor, arms: Sequence[Tensor], vocab_size: int | None, top_logprobs: int) -> int:
    """The vocabulary that counts. Raises ValueError for members that do not fit together."""
    if base.ndim not in (2, 3):
        raise ValueError(f"base_logits of shape {tuple(base.shape)}: expected [R, V] or [R, q, V]")
    for i, logits in enumerate(arms):
        if logits.shape[:-1] != base.shape[:-1]:
            raise ValueError(f"arm_logits[{i}] of shape {tuple(logits.shape)}: expected {(*base.shape[:-1], 'V')}")
    narrowest = min(logits.shape[-1] for logits in (base, *arms))
    vocab_size = narrowest if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= narrowest:
        raise ValueError(f"vocab_size={vocab_size}: expected 1..{narrowest}, the narrowest member")
    if not 0 <= top_logprobs <= vocab_size:
        raise ValueError(f"top_logprobs={top_logprobs}: expected 0..{vocab_size}")
    return vocab_size


def combine(base: Tensor, arms: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """(z_base + Σ w_i z_i, status): float32 (float64 if given) [rows, V] and int32 [rows]; weights [m] or [rows, m]."""
    scores = upcast(base)
    status = invalid(scores, 0)
    masked = scores == -torch.inf
    for i, logits in enumerate(arms):
        weight = weights[..., i].unsqueeze(-1).to(scores.dtype)  # [1] or [rows, 1]
        arm = upcast(logits)
        status = status | invalid(arm, i + 1)
        hole = arm == -torch.inf
        masked = masked | (hole & (weight != 0))
        scores = scores + weight * arm.masked_fill(hole, 0.0)  # 0 · -inf and w < 0 would give NaN and +inf
    return scores.masked_fill(masked, -torch.inf), status


def truncate(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Scores [rows, V] with the tokens that top-k, top-p and min-p drop set to -inf; parameters [rows]."""
    vocab_size = scores.shape[-1]
    limited = (top_k > 0) & (top_k < vocab_size)
    if bool((limited | (top_p < 1)).any()):
        ordered = scores.sort(dim=-1, descending=True).values
        last = torch.where(limited, top_k, vocab_size).sub(1)[:, None]
        threshold = ordered.gather(-1, last)
        ordered = ordered.masked_fill(ordered < threshold, -torch.inf)
        probs = ordered.softmax(-1)
        reached = (probs.cumsum(-1) - probs) < top_p[:, None]  # mass before the token is still short of top_p
        last_p = torch.where(top_p[:, None] < 1, reached.sum(-1, keepdim=True).clamp_min(1) - 1, last)
        threshold = torch.maximum(threshold, ordered.gather(-1, last_p))
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) + min_p[:, None].log(), -torch.inf)


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


def upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.to(torch.float32)


def invalid(logits: Tensor, member: int) -> Tensor:
    """Status bit of a member with a NaN or +inf logit, int32 [rows]."""
    return ((logits.isnan() | (logits == torch.inf)).any(-1).to(torch.int32)) << (member + 1)
