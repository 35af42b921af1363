"""rms_norm and add_rms_norm on a GPU, in Triton: a program for each row, which it keeps in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _native
from .._tensors import dense, launching_on
from .._triton import as_rows, completed, lane_arguments, rounded

WIDEST = 32768  # widest row: 64 numbers in each of 512 threads


@triton.jit
def norm_kernel(
    p_x, s_x, p_y, s_y, p_weight, p_b, p_index, lane_rows, p_sum, p_out, eps, offset,
    H: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, OFFSET: tl.constexpr,
    LANES: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    o_width = tl.arange(0, BLOCK)
    m_width = o_width < H
    b_x = tl.load(p_x + row * s_x + o_width, mask=m_width, other=0.0).to(tl.float32)
    if ADD:
        p_y += row * s_y
        b_y = tl.load(p_y + o_width, mask=m_width, other=0.0).to(tl.float32)
        b_y = completed(
            b_y, p_out, o_width, m_width, p_y + H, p_b, p_index, row // lane_rows, H, 1, BLOCK, LANES, RANK, STEP
        )
        b_x = rounded(b_x + b_y, p_out)
        tl.store(p_sum + row * H + o_width, b_x.to(p_out.dtype.element_ty), mask=m_width)
    b_x = b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=0) / H + eps)
    b_weight = tl.load(p_weight + o_width, mask=m_width, other=0.0).to(tl.float32)
    if OFFSET:
        b_x = b_x * (offset + b_weight)
    else:
        b_x = rounded(b_x, p_out) * b_weight
    tl.store(p_out + row * H + o_width, b_x.to(p_out.dtype.element_ty), mask=m_width)


def run(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    b: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Return (x + y, its norm) for checked arguments; without y, (x, its norm).

    None for dtypes and widths that the kernel does not take.
    """
    width, device = x.shape[-1], x.device
    if x.dtype not in _native.DTYPES or weight.dtype != x.dtype or width > WIDEST or not width:
        return None
    flat, weight = as_rows(x), dense(weight)
    rows = len(flat)
    out = torch.empty(x.shape, dtype=x.dtype, device=device)
    total = x if y is None else torch.empty(x.shape, dtype=x.dtype, device=device)
    added = flat if y is None else as_rows(y)
    block = triton.next_power_of_2(width)
    warps = max(1, min(16, block // 512))
    lanes, constants = lane_arguments(added, b, index, rows, block, warps)
    with launching_on(device):
        norm_kernel[(rows,)](
            flat, flat.stride(0), added, added.stride(0), weight, *lanes, total, out, float(eps), float(offset),
            H=width, BLOCK=block, ADD=y is not None, OFFSET=offset != 0, num_warps=warps, **constants,
        )  # fmt: skip
    return total, out


def launch(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor | None:
    """Launch for checked arguments of rms_norm; None for dtypes and widths that the kernel does not take."""
    found = run(x, None, weight, eps, offset)
    return None if found is None else found[1]
