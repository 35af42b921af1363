"""ragged_append on a GPU, in Triton: a program for each key-value head of a token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _native
from .._tensors import in_memory, launching_on
from .plan import power_of_two


@triton.jit
def append_kernel(
    p_keys, s_key_slot, s_key_head, s_keys, s_key_width,
    p_values, s_value_slot, s_value_head, s_values, s_value_width,
    p_new_keys, s_new_key_row, s_new_key_head, s_new_key_token, s_new_key_width,
    p_new_values, s_new_value_row, s_new_value_head, s_new_value_token, s_new_value_width,
    p_slots, p_positions, block,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, i_token = token // block, token % block
    slot, position = tl.load(p_slots + row), tl.load(p_positions + token)
    o_width = tl.arange(0, BLOCK)
    p_new_keys += row * s_new_key_row + i_head * s_new_key_head + i_token * s_new_key_token
    p_new_values += row * s_new_value_row + i_head * s_new_value_head + i_token * s_new_value_token
    b_keys = tl.load(p_new_keys + o_width * s_new_key_width, mask=o_width < D)
    b_values = tl.load(p_new_values + o_width * s_new_value_width, mask=o_width < DV)
    p_keys += slot * s_key_slot + i_head * s_key_head + position * s_keys
    p_values += slot * s_value_slot + i_head * s_value_head + position * s_values
    tl.store(p_keys + o_width * s_key_width, b_keys, mask=o_width < D)
    tl.store(p_values + o_width * s_value_width, b_values, mask=o_width < DV)


def append(
    keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, slots: Tensor, positions: Tensor
) -> bool | None:
    """Launch for checked arguments; None for dtypes that the kernel does not write, and caches with a negative bit."""
    if keys.dtype not in _native.DTYPES or values.dtype not in _native.DTYPES or keys.is_neg() or values.is_neg():
        return None
    rows, kv_heads, block, width = new_keys.shape
    new_keys, new_values = in_memory(new_keys), in_memory(new_values)
    slots, positions = in_memory(slots).contiguous(), in_memory(positions).contiguous()
    value_width = values.shape[3]
    with launching_on(keys.device):
        append_kernel[(rows * block, kv_heads)](
            keys, *keys.stride(), values, *values.stride(), new_keys, *new_keys.stride(),
            new_values, *new_values.stride(), slots, positions, block,
            D=width, DV=value_width, BLOCK=power_of_two(max(width, value_width)), num_warps=1,
        )  # fmt: skip
    return True
