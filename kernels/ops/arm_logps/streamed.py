"""arm_logps without the full logits, in PyTorch: a block of tokens and vocabulary at a time, forward and backward.

Only labelled positions are multiplied with W, so memory is O(block) instead of O(N · T · V). In the words of
reference.py, with p = softmax z and z' = dz/du = 1 − (z / c)², the gradient with respect to h is linear in the incoming
one:

    d logp_t / d h_t = s · ((1 − p_y) z'_y W_y − Σ_{v≠y} p_v z'_v W_v)

The sum is attention of h_t over keys and values W, and the forward pass streams it as flash attention does
(arXiv 2205.14135), with a running maximum and total; the backward pass only scales it by g_t. A frozen output layer
costs two matrix products in all, as many as the logits and their backward, and no recomputation. The label's term
stands apart, as its difference from p_y would drown in the rounding of half precision.

    dL / dW_v = s · Σ_t g_t (1[v = y_t] − p_tv) z'_tv h_t            (a trainable W: full fine-tuning)

The sum over t needs every g_t: the backward pass goes over the blocks again and finishes a tile of dW at a time. The
logits of the first blocks are kept for it, those of the others computed once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import IGNORE, accumulator

# Tokens and vocabulary of a block, whose logits are alive at once: 8 MB on a CPU, the fastest of 512..4096 columns
# measured with AVX-512 and 2 MB of L2; 268 MB keep a GPU's matrix units busy.
BLOCK = {"cpu": (2048, 1024), "cuda": (2048, 1 << 15)}
# Logits that are kept for the backward pass of a trainable output layer: 134 MB on a CPU.
KEPT_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 26}


def token_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None
) -> Tensor:
    """Every token's log-probability, [N, T], 0 where ignored. ValueError for a label outside [0, V)."""
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
        return torch.zeros(labels.shape, dtype=logps.dtype, device=logps.device).masked_scatter(labelled, logps)


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
        dtype = accumulator(rows.dtype)
        # The maximum over the vocabulary so far. It begins with one token of the lowest logit, which the first real one
        # blots out: where a bias of −inf masks all of the first tile, zero over zero would be NaN.
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
    """The gradients of weight and bias, as far as they are needed."""
    _, need_weight, need_bias = ctx.needs_input_grad[:3]
    # Summed over blocks in full precision: bf16 would lose the later ones.
    d_weight = torch.zeros_like(weight, dtype=accumulator(weight.dtype)) if need_weight else None
    d_bias = torch.zeros_like(bias, dtype=accumulator(bias.dtype)) if need_bias and bias is not None else None
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
    buffers = rows.new_empty((2, min(tokens, count), min(width, vocab)), dtype=accumulator(rows.dtype))
    for column in range(0, vocab, width):
        tile = slice(column, min(column + width, vocab))
        for row in range(0, count, tokens):
            part = slice(row, min(row + tokens, count))
            first, second = buffers[:, : part.stop - row, : tile.stop - column]
            yield part, tile, first, second


def _for_device(settings: dict[str, Any], rows: Tensor) -> Any:
    return settings.get(rows.device.type, settings["cuda"])
