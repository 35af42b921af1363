"""Log-probabilities of labelled tokens straight from hidden states, never holding the full logits.

For hidden states h, output weight W and labels y, with u = s · (h Wᵀ + b) and z = c · tanh(u / c), or u without a cap,

    logp_t = z_t[y_t] − log Σ_v exp z_t[v]            and            R = Σ_t logp_t

is the reward that an autoregressive reward model gives a response (arXiv 2410.08193). Only labelled positions are
multiplied with W, a chunk of rows at a time, so memory is O(chunk · V) instead of O(N · T · V).

The gradient with respect to h is linear in the incoming one, g_t · (e_y − softmax z_t) · (dz/du) · s W, so the forward
pass computes it while the chunk's probabilities are at hand and the backward pass only scales it by g_t: a frozen
output layer costs two matrix products in all, as many as the logits and their backward, and no recomputation. A
trainable W (full fine-tuning) needs g_t inside its sum over t: the forward pass keeps the slopes of the first chunks,
and the backward pass recomputes the logits of the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import custom_ops

IGNORE = -100
# Logits alive at once: 2^23 is 170 rows of a 49,152-token vocabulary (34 MB), the fastest of 2^20..2^25
# measured on a 2-core AVX-512 CPU; 2^26 (268 MB) keeps a GPU's matrix units busy.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
# Slopes that are kept for the backward pass of a trainable output layer: 682 rows of that vocabulary on a CPU.
KEPT_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 26}


def arm_logps_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_tokens: bool = False,
) -> Tensor:
    """The specification of `arm_logps`: full logits, plain autograd."""
    logits = _logits(hidden, weight.to(hidden.dtype), bias, logit_scale, softcap)
    picked = labels.clamp(min=0).unsqueeze(-1)
    logps = torch.log_softmax(logits, -1).gather(-1, picked).squeeze(-1).where(labels != IGNORE, 0.0)
    return logps if return_tokens else logps.sum(-1)


def arm_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_tokens: bool = False,
) -> Tensor:
    """Σ log π of the labelled tokens of each row, differentiable in `hidden`, `weight` and `bias`.

    Args:
        hidden: [N, T, H] final hidden states, any float dtype.
        weight: [V, H] output embedding, cast to the dtype of `hidden`.
        labels: [N, T] int64, aligned: `hidden[n, t]` predicts `labels[n, t]`; −100 is ignored.
        bias: [V] of the output layer, if it has one.
        logit_scale: factor on the logits (Cohere, Granite).
        softcap: logits become `softcap · tanh(logits / softcap)` (Gemma 2).
        return_tokens: return every token's log-probability instead, [N, T], 0 where ignored.

    Returns:
        [N] (or [N, T]) in float32, float64 for float64 input. A row without labels gives 0.

    Raises:
        ValueError: shapes that do not fit together, or a label outside [0, V).
    """
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"labels must be [N, T] for hidden [N, T, H], got {tuple(labels.shape)} for {tuple(hidden.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"weight must be [V, {hidden.shape[2]}] for hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if torch.compiler.is_compiling():
        tokens = custom_ops.arm_logps(hidden, weight, labels, bias, logit_scale, softcap)
        return tokens if return_tokens else tokens.sum(-1)
    labelled = labels != IGNORE
    targets = labels[labelled]
    if targets.numel():
        low, high = map(int, targets.aminmax())
        if low < 0 or high >= len(weight):
            raise ValueError(f"labels must be {IGNORE} or in [0, {len(weight)}), got {low}..{high}")
    if not torch.is_grad_enabled():  # which a Function does not see
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    # Autocast would redo in bf16 what is upcast on purpose, and once more per chunk.
    with torch.autocast(hidden.device.type, enabled=False):
        logps = _ArmLogps.apply(hidden[labelled], weight, bias, targets, logit_scale, softcap)
        tokens = torch.zeros(labels.shape, dtype=logps.dtype, device=logps.device).masked_scatter(labelled, logps)
        return tokens if return_tokens else tokens.sum(-1)


class _ArmLogps(torch.autograd.Function):
    """[M] log-probabilities of `targets` [M] given `rows` [M, H] of hidden states."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        need_rows, need_weight, need_bias = ctx.needs_input_grad[:3]
        ctx.recompute = need_weight or need_bias
        precompute = need_rows and not ctx.recompute
        normaliser = rows.new_empty(len(rows), dtype=_accumulator(rows.dtype))
        logps = torch.empty_like(normaliser)
        direction = torch.empty_like(rows) if precompute else None  # d logps[m] / d rows[m]
        ctx.scale, ctx.softcap = scale, softcap
        used = weight.to(rows.dtype)
        kept: list[Tensor] = []
        kept_rows = _rows(KEPT_ELEMENTS, rows, weight) if ctx.recompute else 0
        for part in _chunks(rows, weight):
            logits = _logits(rows[part], used, bias, scale, softcap)
            normaliser[part] = _log_sum_exp(logits)
            logps[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - normaliser[part]
            if direction is not None:
                slopes = _slopes_(logits, normaliser[part], targets[part], scale, softcap)
                torch.mm(slopes.to(rows.dtype), used, out=direction[part])
                del slopes
            elif min(part.stop, len(rows)) <= kept_rows:
                kept.append(_slopes_(logits, normaliser[part], targets[part], scale, softcap))
            del logits  # before the next ones are made
        if ctx.recompute:
            ctx.save_for_backward(rows, weight, bias, targets, normaliser, *kept)
        else:
            ctx.save_for_backward(direction)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.recompute:
            (direction,) = ctx.saved_tensors
            return (direction * grad[:, None]).to(direction.dtype), None, None, None, None, None
        rows, weight, bias, targets, normaliser, *kept = ctx.saved_tensors
        need_rows, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_rows = torch.empty_like(rows) if need_rows else None
        # Summed over chunks in full precision: bf16 would lose the later ones.
        d_weight = torch.zeros_like(weight, dtype=_accumulator(weight.dtype)) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=_accumulator(bias.dtype)) if need_bias else None
        used = weight.to(rows.dtype)
        for i, part in enumerate(_chunks(rows, weight)):
            if i < len(kept):
                slopes = kept[i] * grad[part, None]
            else:
                slopes = _logits(rows[part], used, bias, ctx.scale, ctx.softcap)
                slopes = _slopes_(slopes, normaliser[part], targets[part], ctx.scale, ctx.softcap)
                slopes.mul_(grad[part, None])
            if d_bias is not None:
                d_bias += slopes.sum(0)
            slopes = slopes.to(rows.dtype)
            if d_weight is not None and d_weight.dtype == rows.dtype:
                d_weight.addmm_(slopes.T, rows[part])  # without a [V, H] temporary for each chunk
            elif d_weight is not None:
                d_weight += slopes.T @ rows[part]
            if d_rows is not None:
                torch.mm(slopes, used, out=d_rows[part])
            del slopes  # before the next ones are made
        return (
            d_rows,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Logits of the last dimension, in float32 at least."""
    logits = (rows @ weight.T).to(_accumulator(rows.dtype))
    if bias is not None:
        logits = logits + bias
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """torch.logsumexp, which on a CPU takes 20 times as long as these four passes."""
    top = logits.amax(-1, keepdim=True)
    return (logits - top).exp_().sum(-1).log_() + top.squeeze(-1)


def _slopes_(logits: Tensor, normaliser: Tensor, targets: Tensor, scale: float, softcap: float | None) -> Tensor:
    """d log π(target) / d (h Wᵀ + b), written over `logits`."""
    cap_slopes = None if softcap is None else 1.0 - (logits / softcap).square()
    slopes = logits.sub_(normaliser[:, None]).exp_().neg_()
    slopes.scatter_add_(-1, targets[:, None], torch.ones_like(slopes[:, :1]))
    if cap_slopes is not None:
        slopes *= cap_slopes
    return slopes if scale == 1.0 else slopes.mul_(scale)


def _rows(elements: dict[str, int], rows: Tensor, weight: Tensor) -> int:
    """How many rows of logits have so many elements."""
    return elements.get(rows.device.type, elements["cuda"]) // weight.shape[0]


def _chunks(rows: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, _rows(CHUNK_ELEMENTS, rows, weight))
    return [slice(i, i + size) for i in range(0, len(rows), size)]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
