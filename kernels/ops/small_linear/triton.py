"""x Wᵀ + bias for up to 16 rows on a GPU, in Triton. A program has a block of outputs and all inputs or a split.

    product   grid (blocks of outputs, splits)   W is read once, for all rows of x, on tensor cores
    total     grid (rows, blocks of outputs)     only with splits: adds these in order, so that all runs agree

cuBLAS has kernels for this as well. `genarm_fast.models.few_rows` measures which of the two is faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _native
from .._tensors import dense, in_memory, launching_on
from .._triton import as_rows

MOST_ROWS = 16  # rows of the smallest product on tensor cores
PROGRAMS = 264  # most programs of a grid with splits: two for each of an H100's 132 multiprocessors
LEAST_CHUNK = 256  # fewest inputs of a split
STEP_BYTES = 256  # bytes of a row of W in one turn of the loop; loads of three turns are under way
STAGES, WARPS = 4, 4
TOTAL_BLOCK = 1024


@triton.jit
def few_rows_kernel(
    p_x, s_x, p_weight, s_weight, p_bias, p_out, rows, width, outputs, chunk,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    o_outputs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_rows, o_step = tl.arange(0, ROWS), tl.arange(0, STEP)
    m_outputs, m_rows = o_outputs < outputs, o_rows < rows
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, width)
    p_weight += o_outputs.to(tl.int64)[:, None] * s_weight + o_step[None, :]
    p_x += o_rows.to(tl.int64)[None, :] * s_x + o_step[:, None]
    b_sums = tl.zeros([BLOCK, ROWS], tl.float32)
    for start in range(begin, end, STEP):
        m_step = start + o_step < end
        b_weight = tl.load(p_weight + start, mask=m_outputs[:, None] & m_step[None, :], other=0.0)
        b_x = tl.load(p_x + start, mask=m_rows[None, :] & m_step[:, None], other=0.0)
        b_sums = tl.dot(b_weight, b_x, b_sums, input_precision="ieee" if IEEE else "tf32")
    m_out = m_outputs[:, None] & m_rows[None, :]
    o_out = o_rows[None, :] * outputs + o_outputs[:, None]
    if SPLIT:
        tl.store(p_out + tl.program_id(1).to(tl.int64) * rows * outputs + o_out, b_sums, mask=m_out)
    else:
        if BIAS:
            b_sums += tl.load(p_bias + o_outputs, mask=m_outputs, other=0.0).to(tl.float32)[:, None]
        tl.store(p_out + o_out, b_sums.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def total_kernel(p_parts, p_bias, p_out, rows, outputs, splits, BLOCK: tl.constexpr, BIAS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    o_outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_outputs = o_outputs < outputs
    b_sums = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        b_sums += tl.load(p_parts + (split * rows + row) * outputs + o_outputs, mask=m_outputs, other=0.0)
    if BIAS:
        b_sums += tl.load(p_bias + o_outputs, mask=m_outputs, other=0.0).to(tl.float32)
    tl.store(p_out + row * outputs + o_outputs, b_sums.to(p_out.dtype.element_ty), mask=m_outputs)


def cut(outputs: int, width: int, step: int) -> tuple[int, int, int]:
    """Return (outputs of a program, splits of the inputs, inputs of a split) for a weight [outputs, width]."""
    block = 32 if outputs >= 32 * PROGRAMS else 16
    splits = min(PROGRAMS // triton.cdiv(outputs, block), width // LEAST_CHUNK)
    if splits < 2:
        return block, 1, width
    chunk = triton.cdiv(triton.cdiv(width, splits), step) * step
    return block, triton.cdiv(width, chunk), chunk


def launch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Return x Wᵀ + bias, [..., out], summed in float32 and rounded once. x: [..., in]. weight: [out, in].

    Return None for what the kernel does not take: more than 16 rows or none, or dtypes that differ or are not float32,
    bfloat16 or float16.
    """
    rows, width = x.shape[:-1].numel(), x.shape[-1]
    if weight.dtype not in _native.DTYPES or x.dtype != weight.dtype or not 0 < rows <= MOST_ROWS:
        return None
    shape, x, weight = (*x.shape[:-1], len(weight)), as_rows(x), dense(weight)
    outputs, device, step = len(weight), x.device, STEP_BYTES // weight.element_size()
    block, splits, chunk = cut(outputs, width, step)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=device)
    own = out if bias is None else in_memory(bias).contiguous()
    parts = out if splits == 1 else torch.empty(splits, rows, outputs, dtype=torch.float32, device=device)
    with launching_on(device):
        few_rows_kernel[(triton.cdiv(outputs, block), splits)](
            x, x.stride(0), weight, weight.stride(0), own, parts, rows, width, outputs, chunk,
            ROWS=MOST_ROWS, BLOCK=block, STEP=step, SPLIT=splits > 1, BIAS=bias is not None,
            IEEE=x.dtype == torch.float32, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        if splits > 1:
            total_kernel[(rows, triton.cdiv(outputs, TOTAL_BLOCK))](
                parts, own, out, rows, outputs, splits, BLOCK=TOTAL_BLOCK, BIAS=bias is not None, num_warps=WARPS
            )
    return out.view(shape)
