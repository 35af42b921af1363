"""The lowest score that a row's filters keep, and what is left of each tile: see triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import GROUPS, INF, LOG2E, MIN_P, TEMPERATURE, TILE, TOP_K, TOP_P, coldness_of, exp_sum, parameter

SCAN = tl.constexpr(4096)  # scores read at a time by `threshold`


@triton.jit
def from_key(key):
    """The float32 at a place in float32's order: the inverse of its sign-magnitude bits read as int32."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def to_key(value):
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def above(p_scores, n, pivot, peak, scale, MASS: tl.constexpr):
    """Mass (or number) of n scores that are at least `pivot`."""
    b_total = tl.zeros([SCAN], tl.float32)
    for start in range(0, n, SCAN):
        offset = start + tl.arange(0, SCAN)
        b_scores = tl.load(p_scores + offset, mask=offset < n, other=-INF)
        b_weight = tl.exp2((b_scores - peak) * scale) if MASS else tl.full([SCAN], 1.0, tl.float32)
        b_total += tl.where((b_scores >= pivot) & (b_scores > -INF), b_weight, 0.0)
    return tl.sum(b_total, axis=0)


@triton.jit
def search(p_scores, n, lowest, target, peak, scale, MASS: tl.constexpr):
    """The largest float32 with at least `target` of mass (or number) at or above it; `lowest` if all is too little."""
    low, high = to_key(lowest).to(tl.int64), to_key(peak).to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        enough = above(p_scores, n, from_key(middle.to(tl.int32)), peak, scale, MASS) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return from_key(low.to(tl.int32))


@triton.jit
def gather_kernel(
    p_parameters, s_rows, s_blocks, p_stats, p_scores, p_peaks, p_found, p_counts, p_totals, block, vocab, tiles,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies the scores that may be the k-th or in the nucleus, in their order; their number and the row's mass."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    i_row, i_block = row // block, row % block
    temperature = parameter(p_parameters, s_rows, s_blocks, TEMPERATURE, i_row, i_block)
    top_k = parameter(p_parameters, s_rows, s_blocks, TOP_K, i_row, i_block)
    top_p = parameter(p_parameters, s_rows, s_blocks, TOP_P, i_row, i_block)
    o_tiles = tl.arange(0, BLOCK)
    b_peaks = tl.load(p_stats + row * tiles + o_tiles, mask=o_tiles < tiles, other=-INF)
    b_sums = tl.load(p_stats + (rows + row) * tiles + o_tiles, mask=o_tiles < tiles, other=0.0)
    peak = tl.max(b_peaks, axis=0)
    coldness = coldness_of(temperature)
    total = tl.sum(tl.where(b_peaks == -INF, 0.0, b_sums * tl.exp2((b_peaks - peak) * coldness * LOG2E)), axis=0)
    p_scores += row * tiles * TILE
    p_found += row * tiles * TILE

    count, bound = tl.zeros([], tl.int32), tl.full([], -INF, tl.float32)
    limited = (top_k > 0) & (top_k < vocab)
    if (temperature > 0) & (peak > -INF) & (peak < INF) & (limited | (top_p < 1)):
        if limited:  # k groups have their maximum at or above this
            p_peaks += row * tiles * GROUPS
            bound = search(p_peaks, tiles * GROUPS, bound, top_k.to(tl.float32), peak, 0.0, False)
        else:  # all below this is less than 1 - top_p of the mass, by a tenth
            bound = peak + (tl.log((1 - top_p) * total / vocab) - 0.1) / coldness
        for start in range(0, tiles * TILE, SCAN):
            offset = start + tl.arange(0, SCAN)
            b_scores = tl.load(p_scores + offset, mask=offset < tiles * TILE, other=-INF)
            b_chosen = ((b_scores >= bound) & (b_scores > -INF)).to(tl.int32)
            tl.store(p_found + count + tl.cumsum(b_chosen, axis=0) - 1, b_scores, mask=b_chosen > 0)
            count += tl.sum(b_chosen, axis=0)
    tl.store(p_counts + row, count)
    tl.store(p_totals + row, total)


@triton.jit
def threshold_kernel(
    p_parameters, s_rows, s_blocks, p_stats, p_found, p_counts, p_totals, p_lowest, block, vocab, tiles,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i_row, i_block = row // block, row % block
    temperature = parameter(p_parameters, s_rows, s_blocks, TEMPERATURE, i_row, i_block)
    top_k = parameter(p_parameters, s_rows, s_blocks, TOP_K, i_row, i_block)
    top_p = parameter(p_parameters, s_rows, s_blocks, TOP_P, i_row, i_block)
    min_p = parameter(p_parameters, s_rows, s_blocks, MIN_P, i_row, i_block)
    o_tiles = tl.arange(0, BLOCK)
    peak = tl.max(tl.load(p_stats + row * tiles + o_tiles, mask=o_tiles < tiles, other=-INF), axis=0)
    coldness = coldness_of(temperature)
    scale = coldness * LOG2E
    p_found += row * tiles * TILE
    count, total = tl.load(p_counts + row), tl.load(p_totals + row)

    lowest = tl.full([], -INF, tl.float32)
    if (temperature > 0) & (peak > -INF) & (peak < INF):
        if (top_k > 0) & (top_k < vocab):
            lowest = search(p_found, count, lowest, top_k.to(tl.float32), peak, 0.0, False)
            total = above(p_found, count, lowest, peak, scale, True)
        if top_p < 1:
            lowest = search(p_found, count, lowest, tl.maximum(top_p * total, 1e-30), peak, scale, True)
        if min_p > 0:
            lowest = tl.maximum(lowest, peak + tl.log(tl.minimum(min_p, 1.0)) / coldness)
    tl.store(p_lowest + row, lowest)


@triton.jit
def kept_kernel(p_temperature, s_temperature_row, s_temperature_block, p_stats, p_scores, p_lowest, p_kept, block):
    i_tile, row, tiles = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    temperature = tl.load(p_temperature + row // block * s_temperature_row + row % block * s_temperature_block)
    tile = row * tiles + i_tile
    b_scores = tl.load(p_scores + tile * TILE + tl.arange(0, TILE))
    b_scores = tl.where(b_scores >= tl.load(p_lowest + row), b_scores, -INF)
    tl.store(p_kept + tile, exp_sum(b_scores, tl.load(p_stats + tile), coldness_of(temperature) * LOG2E))
