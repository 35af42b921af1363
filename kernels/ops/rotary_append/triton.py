"""rotary_append on a GPU, in Triton: a program for each query, key and value head of a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _native
from .._tensors import dense, in_memory, launching_on
from .._triton import as_rows, completed, lane_arguments, rounded
from ..rotary.triton import angle_strides, store_rotated
from .reference import query_heads


@triton.jit
def load_head(
    p_y, column, part, o_columns, m_columns, p_bias, p_b, p_index, lane, OUT: tl.constexpr,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, LANES: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Return columns of a row's product from `column` on, completed by bias and LoRA. part: 0 query, 1 key, 2 value."""
    o_columns = column + o_columns
    b_x = tl.load(p_y + o_columns, mask=m_columns, other=0.0).to(tl.float32)
    if BIAS:
        b_x += tl.load(p_bias + o_columns, mask=m_columns, other=0.0).to(tl.float32)
    p_shrunk = p_y + OUT + part * RANK
    return completed(b_x, p_y, o_columns, m_columns, p_shrunk, p_b, p_index, lane, OUT, 3, BLOCK, LANES, RANK, STEP)


@triton.jit
def rotary_append_kernel(
    p_y, s_y, p_bias, p_b, p_index, lane_rows, p_query_norm, p_key_norm, eps,
    p_cos, s_cos_row, s_cos_token, p_sin, s_sin_row, s_sin_token, p_slots, p_positions,
    p_query, p_keys, s_key_slot, s_key_head, s_keys, s_key_width,
    p_values, s_value_slot, s_value_head, s_values, s_value_width, block,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    LANES: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    token, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, i_token, lane = token // block, token % block, token // lane_rows
    slot, position = tl.load(p_slots + row), tl.load(p_positions + token)
    OUT: tl.constexpr = (HQ + HK) * D + HK * DV
    HALF: tl.constexpr = D // 2
    p_y += token * s_y
    if i_head < HQ + HK:
        is_key = i_head >= HQ
        part = is_key.to(tl.int64)
        o_half = tl.arange(0, BLOCK)
        m_half = o_half < HALF
        b_low = load_head(
            p_y, i_head * D, part, o_half, m_half, p_bias, p_b, p_index, lane, OUT, BLOCK, BIAS, LANES, RANK, STEP
        )
        b_high = load_head(
            p_y, i_head * D + HALF, part, o_half, m_half, p_bias, p_b, p_index, lane, OUT, BLOCK, BIAS,
            LANES, RANK, STEP,
        )  # fmt: skip
        if NORM:
            p_norm = p_query_norm
            if is_key:
                p_norm = p_key_norm
            scale = tl.rsqrt((tl.sum(b_low * b_low, axis=0) + tl.sum(b_high * b_high, axis=0)) / D + eps)
            b_weight = tl.load(p_norm + o_half, mask=m_half, other=0.0).to(tl.float32)
            b_low = rounded(rounded(b_low * scale, p_y) * b_weight, p_y)
            b_weight = tl.load(p_norm + HALF + o_half, mask=m_half, other=0.0).to(tl.float32)
            b_high = rounded(rounded(b_high * scale, p_y) * b_weight, p_y)
        p_cos += row * s_cos_row + i_token * s_cos_token
        p_sin += row * s_sin_row + i_token * s_sin_token
        if is_key:
            p_keys += slot * s_key_slot + (i_head - HQ) * s_key_head + position * s_keys
            store_rotated(b_low, b_high, p_cos, p_sin, p_keys, s_key_width, o_half, m_half, HALF)
        else:
            p_query += (token * HQ + i_head) * D
            store_rotated(b_low, b_high, p_cos, p_sin, p_query, 1, o_half, m_half, HALF)
    else:
        i_head -= HQ + HK
        o_width = tl.arange(0, VALUE_BLOCK)
        m_width = o_width < DV
        b_value = load_head(
            p_y, (HQ + HK) * D + i_head * DV, 2, o_width, m_width, p_bias, p_b, p_index, lane, OUT, VALUE_BLOCK, BIAS,
            LANES, RANK, STEP,
        )  # fmt: skip
        p_values += slot * s_value_slot + i_head * s_value_head + position * s_values
        tl.store(p_values + o_width * s_value_width, b_value.to(p_values.dtype.element_ty), mask=m_width)


def launch(
    y: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    bias: Tensor | None,
    b: Tensor | None,
    index: Tensor | None,
) -> Tensor | None:
    """Launch for checked arguments; None for dtypes that the kernel does not take, and caches with a negative bit."""
    if y.dtype not in _native.DTYPES or keys.is_neg() or values.is_neg():
        return None
    rows, block, _ = y.shape
    heads, kv_heads, width, value_width = (
        query_heads(y, keys, values, b)[0],
        keys.shape[1],
        keys.shape[3],
        values.shape[3],
    )
    flat, cos, sin = as_rows(y), dense(cos), dense(sin)
    slots, positions = in_memory(slots).contiguous(), in_memory(positions).contiguous()
    bias_rows, first, second = (flat if each is None else dense(each) for each in (bias, query_norm, key_norm))
    half, value_block = triton.next_power_of_2(width // 2), triton.next_power_of_2(max(value_width, 1))
    lanes, constants = lane_arguments(flat, b, index, rows * block, max(half, value_block), 1)
    query = torch.empty(rows, block, heads, width, dtype=y.dtype, device=y.device)
    with launching_on(y.device):
        rotary_append_kernel[(rows * block, heads + 2 * kv_heads)](
            flat, flat.stride(0), bias_rows, *lanes, first, second, float(eps),
            cos, *angle_strides(cos), sin, *angle_strides(sin), slots, positions,
            query, keys, *keys.stride(), values, *values.stride(), block,
            HQ=heads, HK=kv_heads, D=width, DV=value_width, BLOCK=half, VALUE_BLOCK=value_block,
            NORM=query_norm is not None, BIAS=bias is not None, num_warps=1, **constants,
        )  # fmt: skip
    return query
