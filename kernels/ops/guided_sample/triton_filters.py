"""The kernels that find the lowest score that a row's filters keep: see triton.py.

Candidates are the scores of groups that reach the row's bound. A score's mass is exp((score - peak) / T).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import (
    GROUPS,
    INF,
    LOG2E,
    MIN_P,
    TEMPERATURE,
    TILE,
    TOP_K,
    TOP_P,
    coldness_of,
    combined,
    parameter,
    weights_below,
)

SCAN = tl.constexpr(4096)  # candidates that a program holds in registers
PIECE = tl.constexpr(2048)  # candidates read at a time of those that do not fit; every pass reads them again
AT_ONCE = tl.constexpr(32)  # groups whose masses are added to the masses of their tiles at once
ROUNDS = tl.constexpr(4)  # rounds that narrow the bound of top-p, to 1/256 of its range
GROUP = tl.constexpr(TILE.value // GROUPS.value)  # tokens in a group


@triton.jit
def from_key(key):
    """Return the float32 of a key: the inverse of `to_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def to_key(value):
    """Return an int32 key for a float32. Keys have the order of their floats."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def above(b_scores, pivot, peak, scale, MASS: tl.constexpr):
    """Return the masses (without MASS, ones) of the scores that are at least `pivot` > -inf, and 0 for other scores."""
    b_weights = tl.exp2((b_scores - peak) * scale) if MASS else tl.full(b_scores.shape, 1.0, tl.float32)
    return tl.where(b_scores >= pivot, b_weights, 0.0)


@triton.jit
def totals(b_first, p_scores, n, first, second, third, peak, scale, MASS: tl.constexpr):
    """Return the mass (without MASS, the number) of n scores at or above each of three pivots.

    b_first: the first of the scores, in registers. p_scores: all n of them.
    """
    sum0 = tl.sum(above(b_first, first, peak, scale, MASS), axis=0)
    sum1 = tl.sum(above(b_first, second, peak, scale, MASS), axis=0)
    sum2 = tl.sum(above(b_first, third, peak, scale, MASS), axis=0)
    if n > b_first.shape[0]:
        b_sums0 = tl.zeros([PIECE], tl.float32)
        b_sums1 = tl.zeros([PIECE], tl.float32)
        b_sums2 = tl.zeros([PIECE], tl.float32)
        for start in range(b_first.shape[0], n, PIECE):
            offset = start + tl.arange(0, PIECE)
            b_more = tl.load(p_scores + offset, mask=offset < n, other=-INF)
            b_sums0 += above(b_more, first, peak, scale, MASS)
            b_sums1 += above(b_more, second, peak, scale, MASS)
            b_sums2 += above(b_more, third, peak, scale, MASS)
        sum0 += tl.sum(b_sums0, axis=0)
        sum1 += tl.sum(b_sums1, axis=0)
        sum2 += tl.sum(b_sums2, axis=0)
    return sum0, sum1, sum2


@triton.jit
def search(b_first, p_scores, n, lowest, target, peak, scale, MASS: tl.constexpr):
    """Return the largest float32 for which the scores at or above it have at least `target` of mass.

    Without MASS the number of scores counts instead. If all scores have too little, the result is `lowest`. Each pass
    tries three pivots, and leaves a quarter of the floats as candidates for the result.
    """
    low, high = to_key(lowest).to(tl.int64), to_key(peak).to(tl.int64)
    while low < high:
        step = (high - low) // 4 + 1
        first, second, third = low + step, tl.minimum(low + 2 * step, high), tl.minimum(low + 3 * step, high)
        sum0, sum1, sum2 = totals(
            b_first, p_scores, n, from_key(first.to(tl.int32)), from_key(second.to(tl.int32)),
            from_key(third.to(tl.int32)), peak, scale, MASS,
        )  # fmt: skip
        enough = (sum0 >= target).to(tl.int64) + (sum1 >= target).to(tl.int64) + (sum2 >= target).to(tl.int64)
        high = tl.where(enough < 3, tl.minimum(high, low + step * (enough + 1) - 1), high)
        low = tl.minimum(low + step * enough, high)
    return from_key(low.to(tl.int32))


@triton.jit
def nucleus_bound(b_highest, b_sums, top_p, total, vocab, peak, coldness):
    """Return a score that is at most the lowest score of the nucleus, from each group's highest score and mass.

    Take a group whose highest score is at least x, so that at most 31 of its tokens are below x. Its mass at or above x
    is at least that of its highest token, and at least its whole mass without 31 tokens of score x. The larger of these
    two counts. If it sums over all groups to top_p, plus a ten-thousandth for rounding, the nucleus ends at x or above.
    """
    scale = coldness * LOG2E
    # All tokens below this score have less than 1 - top_p of the mass together, by a tenth.
    low = peak + (tl.log((1 - top_p) * total / vocab) - 0.1) / coldness
    step = peak - low
    target = top_p * total * 1.0001
    b_most = weights_below(b_highest, peak, scale)
    for _ in tl.static_range(ROUNDS):
        step = step / 4
        start = low
        for i in tl.static_range(1, 4):
            pivot = start + step * i
            b_least = tl.maximum(b_most, b_sums - (GROUP - 1) * tl.exp2((pivot - peak) * scale))
            mass = tl.sum(tl.where(b_highest >= pivot, b_least, 0.0), axis=0)
            low = tl.where(mass >= target, pivot, low)
    return low


@triton.jit
def chosen(b_highest, bound):
    """Return 1 for each group that may have a token at or above the bound, else 0. A bound of +inf gives 0 for all."""
    return ((b_highest >= bound) & (b_highest > -INF) & (b_highest < INF)).to(tl.int32)


@triton.jit(do_not_specialize=["p_parameters"])
def bound_kernel(
    p_parameters, s_rows, s_blocks, p_stats,
    p_groups,  # [2, rows, tiles, GROUPS]: highest score of each group, and its mass relative to the tile's peak
    p_bounds,  # [rows]: a score below which the filters keep nothing; +inf for rows without filters
    p_places,  # [rows, tiles + 1]: number of groups with a score at or above the bound, in all tiles before this one
    block, vocab, tiles,
    BLOCK: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    i_row, i_block = row // block, row % block
    temperature = parameter(p_parameters, s_rows, s_blocks, TEMPERATURE, i_row, i_block, NUMBERS)
    top_k = parameter(p_parameters, s_rows, s_blocks, TOP_K, i_row, i_block, NUMBERS)
    top_p = parameter(p_parameters, s_rows, s_blocks, TOP_P, i_row, i_block, NUMBERS)
    min_p = parameter(p_parameters, s_rows, s_blocks, MIN_P, i_row, i_block, NUMBERS)
    o_tiles = tl.arange(0, BLOCK)
    m_tiles = o_tiles < tiles
    b_peaks = tl.load(p_stats + row * tiles + o_tiles, mask=m_tiles, other=-INF)
    b_sums = tl.load(p_stats + (rows + row) * tiles + o_tiles, mask=m_tiles, other=0.0)
    o_groups = row * tiles * GROUPS + o_tiles[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    b_highest = tl.load(p_groups + o_groups, mask=m_tiles[:, None], other=-INF)
    peak = tl.max(b_peaks, axis=0)
    coldness = coldness_of(temperature)
    b_scales = weights_below(b_peaks, peak, coldness * LOG2E)

    bound = tl.full([], INF, tl.float32)
    limited = (top_k > 0) & (top_k < vocab)
    if (temperature > 0) & (peak > -INF) & (peak < INF) & (limited | (top_p < 1) | (min_p > 0)):
        bound = tl.full([], -INF, tl.float32)
        b_all = tl.reshape(b_highest, [BLOCK * GROUPS])
        if limited:  # at least k groups have their maximum at or above this bound, so at least k tokens do
            bound = search(b_all, p_groups, 0, bound, top_k.to(tl.float32), peak, 0.0, False)
        # With top-k, top-p is a share of the mass that top-k keeps. So a bound of top-p must not drop any of it here.
        if (top_p < 1) & ((top_k <= 0) | (top_k >= vocab)):
            b_groups = tl.load(p_groups + rows * tiles * GROUPS + o_groups, mask=m_tiles[:, None], other=0.0)
            b_masses = tl.reshape(b_groups * b_scales[:, None], [BLOCK * GROUPS])
            total = tl.sum(b_sums * b_scales, axis=0)
            bound = tl.maximum(bound, nucleus_bound(b_all, b_masses, top_p, total, vocab, peak, coldness))
        if (min_p > 0) & ((top_p >= 1) | (top_k <= 0) | (top_k >= vocab)):
            bound = tl.maximum(bound, peak + tl.log(tl.minimum(min_p, 1.0)) / coldness)
    b_counts = tl.sum(chosen(b_highest, bound), axis=1)
    p_places += row * (tiles + 1)
    tl.store(p_places + 1 + o_tiles, tl.cumsum(b_counts, axis=0), mask=m_tiles)
    tl.store(p_places, 0)
    tl.store(p_bounds + row, bound)


@triton.jit(do_not_specialize=["p_weights"])
def collect_kernel(
    p_members, s_member_rows, s_member_blocks, p_weights, s_weights, p_bias, s_bias, p_groups, p_bounds, p_places,
    p_found,  # [rows, tiles, GROUPS, GROUP]: scores of the chosen groups of all tiles in a row, -inf below the bound
    block, vocab,
    BIAS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    i_tile, row, tiles = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    i_row, i_block = row // block, row % block
    bound = tl.load(p_bounds + row)
    o_groups, o_group = tl.arange(0, GROUPS), tl.arange(0, GROUP)
    b_chosen = chosen(tl.load(p_groups + (row * tiles + i_tile) * GROUPS + o_groups), bound)
    if tl.sum(b_chosen, axis=0) > 0:
        b_places = tl.load(p_places + row * (tiles + 1) + i_tile) + tl.cumsum(b_chosen, axis=0) - 1
        offset = i_tile * TILE + o_groups[:, None] * GROUP + o_group[None, :]
        m_chosen = (b_chosen > 0)[:, None]
        b_scores = combined(
            p_members, s_member_rows, s_member_blocks, p_weights, s_weights, p_bias, s_bias, i_row, i_block, offset,
            m_chosen & (offset < vocab), BIAS, NUMBERS,
        )  # fmt: skip
        p_found += row * tiles * TILE
        b_scores = tl.where(b_scores >= bound, b_scores, -INF)
        tl.store(p_found + b_places[:, None] * GROUP + o_group[None, :], b_scores, mask=m_chosen)


@triton.jit
def sums_of_tiles(p_found, p_places, n, lowest, peak, scale, tiles, BLOCK: tl.constexpr):
    """Return the mass of each tile's candidates that are kept, relative to the row's peak."""
    o_tiles = tl.arange(0, BLOCK)
    b_begins = tl.load(p_places + o_tiles, mask=o_tiles < tiles, other=0)
    b_ends = tl.load(p_places + 1 + o_tiles, mask=o_tiles < tiles, other=0)
    b_sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n // GROUP, AT_ONCE):
        o_places = start + tl.arange(0, AT_ONCE)
        offset = o_places[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        b_scores = tl.load(p_found + offset, mask=offset < n, other=-INF)
        b_groups = tl.sum(tl.where(b_scores >= lowest, weights_below(b_scores, peak, scale), 0.0), axis=1)
        m_inside = (o_places[:, None] >= b_begins[None, :]) & (o_places[:, None] < b_ends[None, :])
        b_sums += tl.sum(tl.where(m_inside, b_groups[:, None], 0.0), axis=0)
    return b_sums


@triton.jit
def filtered(
    p_found, p_places, bound, total, temperature, top_k, top_p, min_p, vocab, tiles, peak, BLOCK: tl.constexpr
):  # fmt: skip
    """Return the lowest score kept, and the mass that each tile keeps. total: the mass of all the row's tokens."""
    coldness = coldness_of(temperature)
    scale = coldness * LOG2E
    n = tl.load(p_places + tiles) * GROUP
    offset = tl.arange(0, SCAN)
    b_first = tl.load(p_found + offset, mask=offset < n, other=-INF)
    lowest = tl.full([], -INF, tl.float32)
    if (top_k > 0) & (top_k < vocab):
        lowest = search(b_first, p_found, n, lowest, top_k.to(tl.float32), peak, 0.0, False)
        total, _, _ = totals(b_first, p_found, n, lowest, lowest, lowest, peak, scale, True)
    if top_p < 1:
        lowest = search(b_first, p_found, n, lowest, tl.maximum(top_p * total, 1e-30), peak, scale, True)
    if min_p > 0:
        lowest = tl.maximum(lowest, peak + tl.log(tl.minimum(min_p, 1.0)) / coldness)
    lowest = tl.maximum(lowest, bound)  # if rounding leaves less mass than top_p asks for, all candidates are kept
    return lowest, sums_of_tiles(p_found, p_places, n, lowest, peak, scale, tiles, BLOCK)
