"""gated_mul and silu_mul on a GPU, in Triton: a program for each block of a row's columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _native
from .._tensors import launching_on
from .._triton import as_rows, completed, lane_arguments, rounded
from .reference import ACTIVATIONS, outputs

BLOCK, WARPS = 512, 2  # 8 columns for each thread: loads of 128 bits
SILU, GELU, GELU_TANH = (tl.constexpr(i) for i in range(len(ACTIVATIONS)))


@triton.jit
def gated_kernel(
    p_gate, s_gate, p_up, s_up, p_b, p_index, lane_rows, p_out,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    LANES: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    o_columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_columns = o_columns < WIDTH
    p_gate += row * s_gate
    b_gate = tl.load(p_gate + o_columns, mask=m_columns, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + row * s_up + o_columns, mask=m_columns, other=0.0).to(tl.float32)
    p_shrunk, lane = p_gate + 2 * WIDTH, row // lane_rows
    b_gate = completed(
        b_gate, p_out, o_columns, m_columns, p_shrunk, p_b, p_index, lane, 2 * WIDTH, 2, BLOCK, LANES, RANK, STEP
    )
    b_up = completed(
        b_up, p_out, o_columns, m_columns, p_shrunk + RANK, p_b + WIDTH, p_index, lane, 2 * WIDTH, 2, BLOCK,
        LANES, RANK, STEP,
    )  # fmt: skip
    if ACTIVATION == SILU:
        b_gate = b_gate / (1 + tl.exp(-b_gate))
    elif ACTIVATION == GELU:
        b_gate = 0.5 * b_gate * (1 + tl.erf(b_gate * 0.7071067811865476))
    else:  # 0.5 (1 + tanh(z)) = 1 / (1 + exp(-2 z)), z = sqrt(2 / π) (x + 0.044715 x³)
        b_gate = b_gate / (1 + tl.exp(-1.5957691216057308 * (b_gate + 0.044715 * b_gate * b_gate * b_gate)))
    b_out = rounded(b_gate, p_out) * b_up
    tl.store(p_out + row * WIDTH + o_columns, b_out.to(p_out.dtype.element_ty), mask=m_columns)


def run(gate: Tensor, up: Tensor, out: Tensor, activation: str, b: Tensor | None, index: Tensor | None) -> Tensor:
    """Write act(gate) · up to `out` [..., width] and return it. gate, up: [rows, at least width]."""
    width, rows = out.shape[-1], len(gate)
    lanes, constants = lane_arguments(gate, b, index, rows, BLOCK, WARPS)
    with launching_on(out.device):
        gated_kernel[(rows, triton.cdiv(width, BLOCK))](
            gate, gate.stride(0), up, up.stride(0), *lanes, out,
            WIDTH=width, BLOCK=BLOCK, ACTIVATION=list(ACTIVATIONS).index(activation), num_warps=WARPS, **constants,
        )  # fmt: skip
    return out


def launch(y: Tensor, activation: str, b: Tensor | None, index: Tensor | None) -> Tensor | None:
    """Launch for checked arguments of gated_mul; None for dtypes that the kernel does not read."""
    if y.dtype not in _native.DTYPES:
        return None
    flat, width = as_rows(y), outputs(y, b) // 2
    out = torch.empty((*y.shape[:-1], width), dtype=y.dtype, device=y.device)
    return run(flat, flat[:, width:], out, activation, b, index)


def launch_silu_mul(gate: Tensor, up: Tensor) -> Tensor | None:
    """Launch for silu_mul; None for unequal shapes or dtypes, empty tensors, and dtypes that the kernel can't read."""
    if gate.dtype not in _native.DTYPES or gate.dtype != up.dtype or gate.shape != up.shape or not gate.numel():
        return None
    if not gate.ndim or gate.device != up.device:
        return None
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    return run(as_rows(gate), as_rows(up), out, "silu", None, None)
