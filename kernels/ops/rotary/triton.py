"""rotary on a GPU, in Triton: a program for each head of a token. rotary_append uses `store_rotated`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _native
from .._tensors import dense, in_memory, launching_on
from .._triton import rounded


@triton.jit
def store_rotated(b_low, b_high, p_cos, p_sin, p_out, s_width, o_half, m_half, HALF: tl.constexpr):
    """Rotate a head's two halves and write them. Each product is rounded as PyTorch rounds it."""
    b_cos = tl.load(p_cos + o_half, mask=m_half, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin + o_half, mask=m_half, other=0.0).to(tl.float32)
    b_first = rounded(b_low * b_cos, p_out) - rounded(b_high * b_sin, p_out)
    b_cos = tl.load(p_cos + HALF + o_half, mask=m_half, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin + HALF + o_half, mask=m_half, other=0.0).to(tl.float32)
    b_second = rounded(b_high * b_cos, p_out) + rounded(b_low * b_sin, p_out)
    tl.store(p_out + o_half * s_width, b_first.to(p_out.dtype.element_ty), mask=m_half)
    tl.store(p_out + (HALF + o_half) * s_width, b_second.to(p_out.dtype.element_ty), mask=m_half)


@triton.jit
def rotary_kernel(
    p_x, s_row, s_head, s_token, s_width, p_out, s_out_row, s_out_head, s_out_token, s_out_width,
    p_cos, s_cos_row, s_cos_token, p_sin, s_sin_row, s_sin_token, block,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, i_token = token // block, token % block
    o_half = tl.arange(0, BLOCK)
    m_half = o_half < HALF
    p_x += row * s_row + i_head * s_head + i_token * s_token
    b_low = tl.load(p_x + o_half * s_width, mask=m_half, other=0.0).to(tl.float32)
    b_high = tl.load(p_x + (HALF + o_half) * s_width, mask=m_half, other=0.0).to(tl.float32)
    p_cos += row * s_cos_row + i_token * s_cos_token
    p_sin += row * s_sin_row + i_token * s_sin_token
    p_out += row * s_out_row + i_head * s_out_head + i_token * s_out_token
    store_rotated(b_low, b_high, p_cos, p_sin, p_out, s_out_width, o_half, m_half, HALF)


def angle_strides(angles: Tensor) -> tuple[int, int]:
    """Return the strides of cos or sin [N or 1, q, D]: from row to row (0 for one row), and from token to token."""
    return (0 if angles.shape[0] == 1 else angles.stride(0)), angles.stride(1)


def launch(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor] | None:
    """Launch for query and for key; None for shapes, dtypes or devices that the kernel does not take."""
    if unsqueeze_dim != 1 or not all(tensor.ndim == ndim for tensor, ndim in zip((query, key, cos, sin), (4, 4, 3, 3))):
        return None
    rows, _, block, width = query.shape
    same = all(tensor.dtype == query.dtype and tensor.device == query.device for tensor in (key, cos, sin))
    shapes = cos.shape == sin.shape and cos.shape in ((rows, block, width), (1, block, width))
    if not same or not shapes or query.dtype not in _native.DTYPES or width % 2 or not width:
        return None
    if key.shape != (rows, key.shape[1], block, width):
        return None
    cos, sin = dense(cos), dense(sin)
    angles = (cos, *angle_strides(cos), sin, *angle_strides(sin))
    outputs = []
    with launching_on(query.device):
        for x in map(in_memory, (query, key)):
            out = torch.empty_like(x)
            rotary_kernel[(rows * block, x.shape[1])](
                x, *x.stride(), out, *out.stride(), *angles, block,
                HALF=width // 2, BLOCK=triton.next_power_of_2(width // 2), num_warps=1,
            )  # fmt: skip
            outputs.append(out)
    return outputs[0], outputs[1]
