"""Constants and functions that the kernels of guided_sample share."""

from __future__ import annotations

import triton
import triton.language as tl

from ..philox import TILE_LEVEL, TOKEN_LEVEL

TILE = tl.constexpr(1024)  # part of the random-number contract
GROUPS = tl.constexpr(32)  # groups of tokens in a tile; from their maxima and sums come the bounds of filters
COLDEST = tl.constexpr(1e-30)
INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
_TILE_LEVEL, _TOKEN_LEVEL = tl.constexpr(TILE_LEVEL), tl.constexpr(TOKEN_LEVEL)
# Indices of the parameters in their tuple, and in NUMBERS. NUMBERS[i] is True if parameter i is one number for all
# rows, and False if it is a pointer to a number for each row. The weights have the last entry of NUMBERS.
TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED, POSITION, WEIGHTS = (tl.constexpr(i) for i in range(7))


@triton.jit
def gumbel(seed, level: tl.constexpr, position, index):
    """Return the noise of philox.gumbel; `index` is int32."""
    bits, _, _, _ = tl.philox(seed.to(tl.int64), index, position.to(tl.uint32), level, 0)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1 - 5.9604644775390625e-08)  # 2^-32, 1 - 2^-24
    w = 1 - u
    exponential = tl.where(w == 1, u, -tl.log(w) * u / tl.where(w == 1, 1.0, 1 - w))
    return -tl.log(exponential)


@triton.jit
def parameter(p_parameters, s_rows, s_blocks, which: tl.constexpr, i_row, i_block, NUMBERS: tl.constexpr):
    if NUMBERS[which]:
        value = p_parameters[which]
    else:
        value = tl.load(p_parameters[which] + i_row * s_rows[which] + i_block * s_blocks[which])
    return value


@triton.jit
def coldness_of(temperature):
    return tl.where(temperature == 0, 1.0, 1 / tl.maximum(temperature, COLDEST))


@triton.jit
def load_member(p_members, s_rows, s_blocks, i: tl.constexpr, i_row, i_block, offset, mask):
    return tl.load(p_members[i] + i_row * s_rows[i] + i_block * s_blocks[i] + offset, mask=mask, other=-INF).to(
        tl.float32
    )


@triton.jit
def add_member(b_scores, b_arm, p_weights, s_weights, i: tl.constexpr, i_row, NUMBERS: tl.constexpr):
    """Add w_i z_i of member i (0 is the base) to the scores. p_weights: a tuple of the pointer, or of the numbers."""
    if NUMBERS[WEIGHTS]:
        weight = p_weights[i - 1]
    else:
        weight = tl.load(p_weights[0] + i_row * s_weights + i - 1)
    return b_scores + tl.where(b_arm == -INF, tl.where(weight == 0, 0.0, -INF), weight * b_arm)


@triton.jit
def combined(
    p_members, s_rows, s_blocks, p_weights, s_weights, p_bias, s_bias, i_row, i_block, offset, mask,
    BIAS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Return the scores of a row's tokens `offset`, bit for bit those of scores_kernel."""
    b_scores = load_member(p_members, s_rows, s_blocks, 0, i_row, i_block, offset, mask)
    for i in tl.static_range(1, len(p_members)):
        b_arm = load_member(p_members, s_rows, s_blocks, i, i_row, i_block, offset, mask)
        b_scores = add_member(b_scores, b_arm, p_weights, s_weights, i, i_row, NUMBERS)
    if BIAS:
        b_scores += tl.load(p_bias + i_row * s_bias + offset, mask=mask, other=0.0)
    return b_scores


@triton.jit
def faulty(b_values):
    """Return 1 if any value is NaN or +inf, else 0."""
    return tl.max(((b_values != b_values) | (b_values == INF)).to(tl.int32), axis=0)


@triton.jit
def weights_below(b_values, peak, scale):
    """Return 2^((value - peak) · scale). A scale of log2(e) / T makes it exp((value - peak) / T)."""
    return tl.where(b_values == -INF, 0.0, tl.exp2((b_values - peak) * scale))


@triton.jit
def exp_sum(b_values, peak, scale):
    return tl.sum(weights_below(b_values, peak, scale), axis=0)
