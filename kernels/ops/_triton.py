"""Functions that the Triton kernels of a decoder layer share: PyTorch's rounding, and the B of LoRA lanes."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._tensors import dense, in_memory


def as_rows(tensor: Tensor) -> Tensor:
    """Return a tensor [..., width] as [rows, width], dense in memory and contiguous in its last dimension."""
    return dense(tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1]))


def lane_arguments(y: Tensor, b: Tensor | None, index: Tensor | None, rows: int, block: int, warps: int) -> Any:
    """Return (B, index, rows per lane) for a kernel, and the constants of `completed`.

    block, warps: the columns and the warps of a program. STEP is the number of B's rows that one turn of the loop in
    `expanded` loads. It is chosen so that each thread has 16 numbers of B in flight.
    """
    if b is None or index is None:
        return (y, y, 1), {"LANES": False, "RANK": 1, "STEP": 1}
    rank = b.shape[1]
    step = max(1, min(triton.next_power_of_2(rank), 16 * 32 * warps // block))
    constants = {"LANES": True, "RANK": rank, "STEP": step}
    return (in_memory(b).contiguous(), in_memory(index).contiguous(), max(1, rows // len(index))), constants


@triton.jit
def rounded(b_values, p_like):
    """Round to the dtype of `p_like` and return float32, as PyTorch rounds after each operation."""
    return b_values.to(p_like.dtype.element_ty).to(tl.float32)


@triton.jit
def expanded(
    p_shrunk, p_b, o_columns, m_columns, OUT: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr
):
    """Return Σ_k shrunk[k] · B[k, columns] of one row, in float32. p_shrunk: [RANK]; p_b: [RANK, OUT]."""
    b_sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, RANK, STEP, loop_unroll_factor=4):
        o_ranks = start + tl.arange(0, STEP)
        m_ranks = o_ranks < RANK
        b_shrunk = tl.load(p_shrunk + o_ranks, mask=m_ranks, other=0.0).to(tl.float32)
        b_b = tl.load(
            p_b + o_ranks[:, None] * OUT + o_columns[None, :], mask=m_ranks[:, None] & m_columns[None, :], other=0.0
        )
        b_sums += tl.sum(b_shrunk[:, None] * b_b.to(tl.float32), axis=0)
    return b_sums


@triton.jit
def completed(
    b_x, p_like, o_columns, m_columns, p_shrunk, p_b, p_index, lane, OUT: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Add its lane's LoRA to columns of a row's product, and round the sum.

    p_shrunk: the row's shrunk inputs of adapter 0, for the linear that the columns belong to.
    """
    if LANES:
        adapter = tl.load(p_index + lane)
        if adapter >= 0:
            p_shrunk += adapter * PARTS * RANK
            b_x += expanded(p_shrunk, p_b + adapter * RANK * OUT, o_columns, m_columns, OUT, RANK, STEP, BLOCK)
    return rounded(b_x, p_like)
