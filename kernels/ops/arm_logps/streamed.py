"""arm_logps without the full logits: a block of tokens and vocabulary at a time, forward and backward.

Memory is O(block) instead of O(N · T · V). Only labelled positions are multiplied with W, unless the labels are on a
GPU. In the notation of reference.py, let p = softmax z, z' = dz/du = 1 − (z / c)², and let g_t be the gradient that
comes in for logp_t. The gradient with respect to h is linear in g:

    d logp_t / d h_t = s · ((1 − p_y) z'_y W_y − Σ_{v≠y} p_v z'_v W_v)

The sum over v is attention of h_t over keys and values W. The forward pass streams it as flash attention does
(arXiv 2205.14135), with a running maximum and total. The backward pass only scales it by g_t. So a frozen output layer
costs two matrix products, as many as the logits and their backward pass, and nothing is computed twice. The label's
term is computed apart: in half precision the rounding of the sum would swallow 1 − p_y.

    dL / dW_v = s · Σ_t g_t (1[v = y_t] − p_tv) z'_tv h_t            (a trainable W: full fine-tuning)

The sum over t needs every g_t. So the backward pass goes over the blocks again, and finishes one tile of dW after the
other. The logits of the first blocks are kept for it, and those of the other blocks are computed again. PyTorch
computes the products on every device. The steps between two products are in tiles.py (PyTorch) and triton.py (kernels).
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

# Tokens and vocabulary entries of a block, whose logits are in memory at once. On a CPU these are 8 MB: 1024 columns
# were the fastest of 512..4096, measured with AVX-512 and 2 MB of L2. On a GPU 134 MB in bfloat16 keep the matrix units
# busy.
BLOCK = {"cpu": (2048, 1024), "cuda": (2048, 1 << 15)}
# Most logits kept for the backward pass of a trainable output layer: 134 MB on a CPU, and in bfloat16 on a GPU.
KEPT_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 26}
ALIGNED = 16  # A row of a block takes a multiple of this many columns in memory, so that kernels load 128 bits at once.


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    tiles: Tiles = PyTorchTiles(),  # noqa: B008  (has no state)
) -> Tensor:
    """Return every token's log-probability, [N, T], 0 where the label is ignored.

    Raises ValueError for a label outside [0, V) if the labels are on the CPU. Labels on a GPU are not read by the host:
    a label outside [0, V) fails an assertion on the GPU, and ignored positions are multiplied like the others.
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
    """Return log-probabilities [M] of `targets` [M], all in [0, V), given hidden states `rows` [M, H].

    The host reads no tensor.
    """
    bias, scale, softcap = layer
    if not torch.is_grad_enabled():  # a Function's needs_input_grad does not depend on the grad mode
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    # Autocast would cast values back to bf16 that are upcast on purpose, and would do so again for each block.
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
        # The maximum over the vocabulary so far. It starts as if there had been one token of the lowest finite logit,
        # which the first real token outweighs. With −inf and a total of 0, a first tile that a bias of −inf masks
        # completely would give 0 / 0, which is NaN.
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
    """Return the gradients of weight and bias, None for one that is not needed. kept: logits of the first blocks."""
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
            # A tile is summed over all tokens in full precision, then rounded. A sum in bf16 would lose later tokens.
            if part.start == 0:
                total = d_weight[tile].to(accumulator(weight.dtype))  # zeros; a view of d_weight if dtypes are equal
            _add_product_(total, slopes.T, rows[part])
            if part.stop == len(rows) and total.dtype != d_weight.dtype:
                d_weight[tile] = total
    return d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype)


def _add_product_(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `out`, multiplied in the dtype of `right`."""
    if out.dtype == right.dtype:
        out.addmm_(left, right)
    else:
        out += left.to(right.dtype) @ right


def _blocks(rows: Tensor, weight: Tensor, tiles: Tiles) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield (slice of tokens, slice of the vocabulary, buffer, buffer) for each block.

    All blocks of one slice of the vocabulary come before the next slice. If `tiles` asks for one buffer, both are the
    same. The buffers serve all blocks, because page faults of fresh memory took 5 % of the time.
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
