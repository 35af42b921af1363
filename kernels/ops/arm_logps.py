"""Log-probabilities of labelled tokens straight from hidden states, never holding the full logits.

For hidden states h, output weight W and labels y, with u = s · (h Wᵀ + b) and z = c · tanh(u / c), or u without a cap,

    logp_t = z_t[y_t] − log Σ_v exp z_t[v]            and            R = Σ_t logp_t

is the reward that an autoregressive reward model gives a response (arXiv 2410.08193). Only labelled positions are
multiplied with W, a block of tokens and vocabulary at a time, so memory is O(block) instead of O(N · T · V).

The gradient with respect to h is linear in the incoming one: with p = softmax z and z' = dz/du = 1 − (z / c)²,

    d logp_t / d h_t = s · ((1 − p_y) z'_y W_y − Σ_{v≠y} p_v z'_v W_v)

is attention of h_t over keys and values W, and the forward pass streams it as flash attention does (arXiv 2205.14135),
with a running maximum and total; the backward pass only scales it by g_t. A frozen output layer costs two matrix
products in all, as many as the logits and their backward, and no recomputation. The label's term stands apart, as its
difference from p_y would drown in the rounding of half precision.

    dL / dW_v = s · Σ_t g_t (1[v = y_t] − p_tv) z'_tv h_t            (a trainable W: full fine-tuning)

needs g_t inside its sum over t: the backward pass goes over the blocks again and finishes a tile of dW at a time. The
logits of the first blocks are kept for it, those of the others computed once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import custom_ops

IGNORE = -100
# Tokens and vocabulary of a block, whose logits are alive at once: 8 MB on a CPU, the fastest of 512..4096 columns
# measured with AVX-512 and 2 MB of L2; 268 MB keep a GPU's matrix units busy.
BLOCK = {"cpu": (2048, 1024), "cuda": (2048, 1 << 15)}
# Logits that are kept for the backward pass of a trainable output layer: 134 MB on a CPU.
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
    logits = (hidden @ weight.to(hidden.dtype).T).to(_accumulator(hidden.dtype))
    logits = (logits if bias is None else logits + bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
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
        TypeError: labels that are not integers.
        ValueError: shapes that do not fit together, tensors on other devices than `hidden`, a label outside [0, V), a
            softcap that is not above 0.
    """
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"labels must be [N, T] for hidden [N, T, H], got {tuple(labels.shape)} for {tuple(hidden.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"weight must be [V, {hidden.shape[2]}] for hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}] for weight {tuple(weight.shape)}, got {tuple(bias.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    for name, tensor in (("weight", weight), ("labels", labels), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:  # torch 2.13 multiplies with a meta tensor's nothing
            raise ValueError(f"{name} must be on {hidden.device}, where hidden is, got {tensor.device}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be a finite number above 0, or None, got {softcap}")
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
    # Autocast would redo in bf16 what is upcast on purpose, and once more per block.
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
        need_rows, *need_layer = ctx.needs_input_grad[:3]
        ctx.scale, ctx.softcap = scale, softcap
        dtype = _accumulator(rows.dtype)
        # Of the vocabulary so far. It begins with one token of the lowest logit, which the first real one blots out:
        # zero over zero where a bias of −inf masks all of the first tile would be NaN.
        top = rows.new_full((len(rows), 1), torch.finfo(dtype).min, dtype=dtype)
        total = torch.ones_like(top)  # Σ exp(z − top)
        mean = torch.zeros_like(rows, dtype=dtype) if need_rows else None  # Σ_{v≠y} p_v z'_v W_v
        chosen = torch.empty_like(top)  # z[y]
        kept: list[Tensor] = []
        room = _for_device(KEPT_ELEMENTS, rows) if any(need_layer) else 0
        for part, tile, logits, exps in _blocks(rows, weight):
            room -= logits.numel()
            if room >= 0:
                logits = torch.empty_like(logits)
                kept.append(logits)
            head = weight[tile].to(rows.dtype)
            _logits_(logits, rows[part], head, tile, bias, scale, softcap)
            columns, inside = _label_columns(targets[part], tile)
            chosen[part] = logits.gather(1, columns).where(inside, chosen[part])
            higher = torch.maximum(top[part], logits.amax(1, keepdim=True))
            torch.sub(logits, higher, out=exps).exp_()
            before = total[part] * (top[part] - higher).exp_()
            total[part] = before + exps.sum(1, keepdim=True)
            top[part] = higher
            if mean is not None:
                exps.scatter_(1, columns, exps.gather(1, columns).masked_fill(inside, 0.0))
                if softcap is not None:
                    exps *= _cap_slope(logits, softcap)
                mean[part] *= before / total[part]
                _add_product_(mean[part], exps.div_(total[part]), head)
        normaliser = top + total.log()
        logps = chosen - normaliser
        direction = None  # d logp / d rows
        if mean is not None:
            gain = -torch.expm1(logps)
            if softcap is not None:
                gain *= _cap_slope(chosen, softcap)
            direction = mean.neg_().addcmul_(gain, weight[targets].to(rows.dtype).to(dtype)).mul_(scale).to(rows.dtype)
        layer = (rows, weight, bias, targets, normaliser, *kept) if any(need_layer) else ()
        ctx.save_for_backward(direction, *layer)
        return logps.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        direction, *layer = ctx.saved_tensors
        d_rows = None if direction is None else (direction * grad[:, None]).to(direction.dtype)
        d_weight, d_bias = _layer_gradients(ctx, grad, *layer) if layer else (None, None)
        return d_rows, d_weight, d_bias, None, None, None


def _layer_gradients(
    ctx: Any,
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    normaliser: Tensor,
    *kept: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Those of weight and bias, as far as they are needed."""
    _, need_weight, need_bias = ctx.needs_input_grad[:3]
    # Summed over blocks in full precision: bf16 would lose the later ones.
    d_weight = torch.zeros_like(weight, dtype=_accumulator(weight.dtype)) if need_weight else None
    d_bias = torch.zeros_like(bias, dtype=_accumulator(bias.dtype)) if need_bias and bias is not None else None
    gains = grad[:, None] * -ctx.scale
    for i, (part, tile, logits, slopes) in enumerate(_blocks(rows, weight)):
        if i < len(kept):
            logits = kept[i]
        else:
            head = weight[tile].to(rows.dtype)
            _logits_(logits, rows[part], head, tile, bias, ctx.scale, ctx.softcap)
        torch.sub(logits, normaliser[part], out=slopes).exp_()
        columns, inside = _label_columns(targets[part], tile)
        slopes.scatter_add_(1, columns, -inside.to(slopes.dtype))
        if ctx.softcap is not None:
            slopes *= _cap_slope(logits, ctx.softcap)
        slopes *= gains[part]
        if d_bias is not None:
            d_bias[tile] += slopes.sum(0)
        if d_weight is not None:
            _add_product_(d_weight[tile], slopes.T, rows[part])
    return (
        None if d_weight is None else d_weight.to(weight.dtype),
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


def _logits_(
    out: Tensor, rows: Tensor, head: Tensor, tile: slice, bias: Tensor | None, scale: float, softcap: float | None
) -> None:
    if out.dtype == rows.dtype:
        torch.mm(rows, head.T, out=out)
    else:
        out.copy_(rows @ head.T)
    if bias is not None:
        out += bias[tile]
    if scale != 1.0:
        out *= scale
    if softcap is not None:
        out.div_(softcap).tanh_().mul_(softcap)


def _cap_slope(logits: Tensor, softcap: float) -> Tensor:
    return 1.0 - (logits / softcap).square_()


def _add_product_(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, multiplied in the dtype of `right`."""
    if out.dtype == right.dtype:
        out.addmm_(left, right)
    else:
        out += left.to(right.dtype) @ right


def _label_columns(targets: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """[M, 1] columns of the labels in a tile, any column for a label outside it, and which are inside."""
    columns = targets[:, None] - tile.start
    width = tile.stop - tile.start
    return columns.clamp(0, width - 1), (columns >= 0) & (columns < width)


def _blocks(rows: Tensor, weight: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """(tokens, vocabulary, two buffers for the block) ...; all tokens meet a tile of `weight` before the next tile.

    The buffers serve all blocks: page faults of fresh memory took 5 % of the time.
    """
    tokens, width = _for_device(BLOCK, rows)
    count, vocab = len(rows), len(weight)
    buffers = rows.new_empty((2, min(tokens, count), min(width, vocab)), dtype=_accumulator(rows.dtype))
    for column in range(0, vocab, width):
        tile = slice(column, min(column + width, vocab))
        for row in range(0, count, tokens):
            part = slice(row, min(row + tokens, count))
            first, second = buffers[:, : part.stop - row, : tile.stop - column]
            yield part, tile, first, second


def _for_device(settings: dict[str, Any], rows: Tensor) -> Any:
    return settings.get(rows.device.type, settings["cuda"])


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
