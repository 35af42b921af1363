"""arm_logps on a GPU, in Triton: the arithmetic on a tile of logits between two products of cuBLAS (streamed.py).

    absorb    grid (rows)           a row's maximum and sum over the tile, and its label's logit; then, while the row
                                    is in the cache, the factors of the tile's rows of W, written over the logits
    slopes    grid (rows, blocks)   for a trained output layer, the gradient by the logits, written over the logits

A tile has the dtype of the product. So kernels read and write 2 bytes for each logit of half precision. They compute
in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _native
from .._tensors import in_memory, launching_on
from .streamed import token_logps
from .tiles import Layer, Sums

INF = tl.constexpr(float("inf"))
BLOCK, WARPS = 4096, 8  # 16 columns for each thread: two loads of 128 bits in flight
SLOPES_BLOCK, SLOPES_WARPS = 1024, 4


@triton.jit
def finished(b_products, p_bias, o_columns, m_columns, scale, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return logits from products, in float32: bias, scale and softcap applied."""
    b_logits = b_products.to(tl.float32)
    if BIAS:
        b_logits += tl.load(p_bias + o_columns, mask=m_columns, other=0.0).to(tl.float32)
    b_logits *= scale
    if SOFTCAP:  # tanh(x) = 1 - 2 / (1 + exp(2 x))
        b_logits = softcap - 2 * softcap / (1 + tl.exp(2 * b_logits / softcap))
    return b_logits


@triton.jit
def absorb_kernel(
    p_logits, s_logits, p_out, s_out, p_targets, p_bias, p_top, p_total, p_chosen, p_fade,
    first, width, scale, softcap,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, WANTED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p_logits += row * s_logits
    label = tl.load(p_targets + row) - first
    here = (label >= 0) & (label < width)
    # Read the label's logit before the first loop. The second loop may write over it. The first loop's reductions wait
    # for all warps, so every warp has read the logit by then.
    chosen = tl.load(p_logits + label, mask=here, other=0.0)
    chosen = finished(chosen, p_bias, label, here, scale, softcap, BIAS, SOFTCAP)
    tl.store(p_chosen + row, chosen, mask=here)
    old_top, old_total = tl.load(p_top + row), tl.load(p_total + row)
    top, total = old_top, old_total
    o_block = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        o_columns = start + o_block
        m_columns = o_columns < width
        b_logits = tl.load(p_logits + o_columns, mask=m_columns, other=0.0)
        b_logits = finished(b_logits, p_bias, o_columns, m_columns, scale, softcap, BIAS, SOFTCAP)
        b_logits = tl.where(m_columns, b_logits, -INF)
        higher = tl.maximum(top, tl.max(b_logits, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(b_logits - higher), axis=0)
        top = higher
    tl.store(p_top + row, top)
    tl.store(p_total + row, total)
    if WANTED:
        tl.store(p_fade + row, old_total * tl.exp(old_top - top) / total)
        share = 1 / total
        p_out += row * s_out
        for start in range(0, width, BLOCK):
            o_columns = start + o_block
            m_columns = o_columns < width
            b_logits = tl.load(p_logits + o_columns, mask=m_columns, other=0.0)
            b_logits = finished(b_logits, p_bias, o_columns, m_columns, scale, softcap, BIAS, SOFTCAP)
            b_weights = tl.exp(b_logits - top) * share
            if SOFTCAP:
                b_weights *= 1 - (b_logits / softcap) * (b_logits / softcap)
            b_weights = tl.where(o_columns == label, 0.0, b_weights)
            tl.store(p_out + o_columns, b_weights.to(p_out.dtype.element_ty), mask=m_columns)


@triton.jit
def slopes_kernel(
    p_logits, s_logits, p_out, s_out, p_targets, p_bias, p_normaliser, p_gains, first, width, scale, softcap,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    o_columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_columns = o_columns < width
    b_logits = tl.load(p_logits + row * s_logits + o_columns, mask=m_columns, other=0.0)
    b_logits = finished(b_logits, p_bias, o_columns, m_columns, scale, softcap, BIAS, SOFTCAP)
    b_slopes = tl.exp(b_logits - tl.load(p_normaliser + row))
    b_slopes = tl.where(o_columns == tl.load(p_targets + row) - first, b_slopes - 1, b_slopes)
    if SOFTCAP:
        b_slopes *= 1 - (b_logits / softcap) * (b_logits / softcap)
    b_slopes *= tl.load(p_gains + row)
    tl.store(p_out + row * s_out + o_columns, b_slopes.to(p_out.dtype.element_ty), mask=m_columns)


class TritonTiles:
    """Tiles of products as cuBLAS writes them. The kernels apply bias, scale and softcap whenever they read a tile."""

    buffers = 1

    def dtype(self, rows: Tensor) -> torch.dtype:
        return rows.dtype

    def logits_(self, out: Tensor, rows: Tensor, head: Tensor, tile: slice, layer: Layer) -> None:
        torch.mm(rows, head.T, out=out)

    def absorb(
        self, logits: Tensor, out: Tensor, targets: Tensor, tile: slice, layer: Layer, sums: Sums, wanted: bool
    ) -> Tensor | None:
        bias, options = _options(logits, tile, layer)
        fade = torch.empty(sums.top.shape, dtype=sums.top.dtype, device=logits.device)
        with launching_on(logits.device):
            absorb_kernel[(len(logits),)](
                logits, logits.stride(0), out, out.stride(0), targets, bias, *sums, fade,
                tile.start, logits.shape[1], layer.scale, layer.softcap or 0.0,
                BLOCK=BLOCK, WANTED=wanted, num_warps=WARPS, **options,
            )  # fmt: skip
        return fade if wanted else None

    def slopes_(
        self, logits: Tensor, out: Tensor, targets: Tensor, tile: slice, layer: Layer, normaliser: Tensor, gains: Tensor
    ) -> None:
        (rows, width), (bias, options) = logits.shape, _options(logits, tile, layer)
        with launching_on(logits.device):
            slopes_kernel[(rows, triton.cdiv(width, SLOPES_BLOCK))](
                logits, logits.stride(0), out, out.stride(0), targets, bias, normaliser, gains.contiguous(),
                tile.start, width, layer.scale, layer.softcap or 0.0,
                BLOCK=SLOPES_BLOCK, num_warps=SLOPES_WARPS, **options,
            )  # fmt: skip


def _options(logits: Tensor, tile: slice, layer: Layer) -> tuple[Tensor, dict[str, bool]]:
    """Return the tile's bias, or a tensor that nothing reads, and the constants BIAS and SOFTCAP of `finished`."""
    bias = logits if layer.bias is None else in_memory(layer.bias[tile]).contiguous()
    return bias, {"BIAS": layer.bias is not None, "SOFTCAP": layer.softcap is not None}


TILES = TritonTiles()


def launch(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None
) -> Tensor | None:
    """Launch for checked arguments; None for dtypes that the kernels do not read. The host reads no tensor."""
    if hidden.dtype not in _native.DTYPES:
        return None
    return token_logps(hidden, weight, labels, bias, logit_scale, softcap, TILES)
