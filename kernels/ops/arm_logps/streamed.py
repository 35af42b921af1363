"""arm_logps without the full logits: a block of tokens and vocabulary at a time, forward and backward.

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
logits of the first blocks are kept for it, those of the others computed once more. Products are PyTorch's on every
device; what is between them, tiles.py does in PyTorch or triton.py in one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from .reference import IGNORE, accumulator
from .tiles import Layer, PyTorchTiles, Sums, Tiles, cap_slope

# Tokens and vocabulary of a block, whose logits are alive at once: 8 MB on a CPU, the fastest of 512..4096 columns
# measured with AVX-512 and 2 MB of L2; 134 MB in bfloat16 keep a GPU's matrix units busy.
BLOCK = {"cpu": (2048, 1024), "cuda": (2048, 1 << 15)}
# Logits that are kept for the backward pass of a trainable output layer: 134 MB on a CPU, and of bfloat16 on a GPU.
KEPT_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 26}
ALIGNED = 16  # columns of memory that a row of a block takes a multiple of: so kernels load 128 bits


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    tiles: Tiles = PyTorchTiles(),  # noqa: B008  (has no state)
) -> Tensor:
    """Every token's log-probability, [N, T], 0 where ignored. ValueError for a label outside [0, V) that the host has.

    Labels on a GPU are not read: those outside fail an assertion there, and ignored positions are multiplied like all.
    """
    layer, rows, ignored = Layer(bias, logit_scale, softcap), hidden.flatten(0, 1), labels == IGNORE
    if labels.device.type in _dispatch.GPUS:
        targets = labels.masked_fill(ignored, 0).flatten()
        inside = ((targets >= 0) & (targets < len(weight))).all()
        torch._assert_async(inside, f"labels must be {IGNORE} or in [0, {len(weight)})")
        return target_logps(rows, weight, targets, layer, tiles).view(labels.shape).masked_fill(ignored, 0.0)
    targets = labels[~ignored]
    if targets.numel():
        low, high = map(int, targets.aminmax())
        if low < 0 or high >= len(weight):
            raise ValueError(f"labels must be {IGNORE} or in [0, {len(weight)}), got {low}..{high}")
    index = (~ignored).flatten().nonzero()[:, 0].to(hidden.device)
    logps = target_logps(rows[index], weight, targets.to(hidden.device), layer, tiles)
    return logps.new_zeros(labels.numel()).index_put((index,), logps).view(labels.shape)


def target_logps(rows: Tensor, weight: Tensor, targets: Tensor, layer: Layer, tiles: Tiles) -> Tensor:
    """[M] log-probabilities of `targets` [M], which are in [0, V), given `rows` [M, H]. Reads nothing on the host."""
    bias, scale, softcap = layer
    if not torch.is_grad_enabled():  # which a Function does not see
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    # Autocast would redo in bf16 what is upcast on purpose, and once more per block.
    with torch.autocast(rows.device.type, enabled=False):
        return _ArmLogps.apply(rows, weight, bias, targets, scale, softcap, tiles)


class _ArmLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        tiles: Tiles,
    ) -> Tensor:
        need_rows, *need_layer = ctx.needs_input_grad[:3]
        ctx.scale, ctx.softcap, ctx.tiles = scale, softcap, tiles
        layer, dtype = Layer(bias, scale, softcap), accumulator(rows.dtype)
        # The maximum over the vocabulary so far. It begins with one token of the lowest logit, which the first real one
        # blots out: where a bias of −inf masks all of the first tile, zero over zero would be NaN.
        top = rows.new_full((len(rows), 1), torch.finfo(dtype).min, dtype=dtype)
        sums = Sums(top, torch.ones_like(top), torch.empty_like(top))
        mean = torch.zeros_like(rows, dtype=dtype) if need_rows else None  # Σ_{v≠y} p_v z'_v W_v
        kept: list[Tensor] = []
        room = _for_device(KEPT_ELEMENTS, rows) if any(need_layer) else 0
        for part, tile, logits, weights in _blocks(rows, weight, tiles):
            room -= logits.numel()
            if room >= 0:
                logits = torch.empty_like(logits)
                kept.append(logits)
            head = weight[tile].to(rows.dtype)
            tiles.logits_(logits, rows[part], head, tile, layer)
            own = Sums(*(each[part] for each in sums))
            fade = tiles.absorb(logits, weights, targets[part], tile, layer, own, mean is not None)
            if mean is not None and fade is not None:
                mean[part] *= fade
                _add_product_(mean[part], weights, head)
        normaliser = sums.top + sums.total.log()
        logps = sums.chosen - normaliser
        direction = None  # d logp / d rows
        if mean is not None:
            gain = -torch.expm1(logps)
            if softcap is not None:
                gain *= cap_slope(sums.chosen, softcap)
            direction = mean.neg_().addcmul_(gain, weight[targets].to(rows.dtype).to(dtype)).mul_(scale).to(rows.dtype)
        saved = (rows, weight, bias, targets, normaliser, *kept) if any(need_layer) else ()
        ctx.save_for_backward(direction, *saved)
        return logps.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        direction, *saved = ctx.saved_tensors
        d_rows = None if direction is None else (direction * grad[:, None]).to(direction.dtype)
        d_weight, d_bias = _layer_gradients(ctx, grad, *saved) if saved else (None, None)
        return d_rows, d_weight, d_bias, None, None, None, None


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
    layer, tiles = Layer(bias, ctx.scale, ctx.softcap), ctx.tiles
    d_weight = torch.zeros_like(weight) if need_weight else None
    d_bias = torch.zeros_like(bias, dtype=accumulator(bias.dtype)) if need_bias and bias is not None else None
    gains = grad[:, None] * -ctx.scale
    for i, (part, tile, logits, slopes) in enumerate(_blocks(rows, weight, tiles)):
        if i < len(kept):
            logits = kept[i]
        else:
            tiles.logits_(logits, rows[part], weight[tile].to(rows.dtype), tile, layer)
        tiles.slopes_(logits, slopes, targets[part], tile, layer, normaliser[part], gains[part])
        if d_bias is not None:
            d_bias[tile] += slopes.sum(0, dtype=d_bias.dtype)
        if d_weight is not None:
            # A tile is summed over all tokens in full precision, and then rounded: bf16 would lose the later ones.
            if part.start == 0:
                total = d_weight[tile].to(accumulator(weight.dtype))  # zeros; d_weight itself in full precision
            _add_product_(total, slopes.T, rows[part])
            if part.stop == len(rows) and total.dtype != d_weight.dtype:
                d_weight[tile] = total
    return d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype)


def _add_product_(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, multiplied in the dtype of `right`."""
    if out.dtype == right.dtype:
        out.addmm_(left, right)
    else:
        out += left.to(right.dtype) @ right


def _blocks(rows: Tensor, weight: Tensor, tiles: Tiles) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """(tokens, vocabulary, two buffers for the block, or one twice) ...; all tokens meet a tile of `weight` before the
    next tile.

    The buffers serve all blocks: page faults of fresh memory took 5 % of the time.
    """
    tokens, width = _for_device(BLOCK, rows)
    count, vocab = len(rows), len(weight)
    widest = -(-min(width, vocab) // ALIGNED) * ALIGNED
    shape = (tiles.buffers, min(tokens, count), widest)
    buffers = torch.empty(shape, dtype=tiles.dtype(rows), device=rows.device)
    for column in range(0, vocab, width):
        tile = slice(column, min(column + width, vocab))
        for row in range(0, count, tokens):
            part = slice(row, min(row + tokens, count))
            block = buffers[:, : part.stop - row, : tile.stop - column]
            yield part, tile, block[0], block[-1]


def _for_device(settings: dict[str, Any], rows: Tensor) -> Any:
    return settings.get(rows.device.type, settings["cuda"])
