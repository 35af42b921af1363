"""The kernel that reads the logits, and the kernel that draws the tokens: see triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import (
    _TILE_LEVEL,
    _TOKEN_LEVEL,
    GROUPS,
    INF,
    LOG2E,
    MIN_P,
    POSITION,
    SEED,
    TEMPERATURE,
    TILE,
    TOP_K,
    TOP_P,
    add_member,
    coldness_of,
    combined,
    exp_sum,
    faulty,
    gumbel,
    load_member,
    parameter,
    weights_below,
)
from .triton_filters import filtered


@triton.jit(do_not_specialize=["p_weights", "p_parameters"])
def scores_kernel(
    p_members, s_member_rows, s_member_blocks, p_weights, s_weights, p_bias, s_bias, p_parameters, s_rows, s_blocks,
    p_stats,  # [2 + 2 · members, rows, tiles]: peaks and sums of the scores, then peaks and sums of each member
    p_flags,  # [rows, tiles]: the row's status, from this tile's tokens
    p_scores,  # [rows, tiles · TILE]: the combined scores
    p_groups,  # [2, rows, tiles, GROUPS]: peak of each group of tokens, and its mass relative to the tile's peak
    block, vocab,
    BIAS: tl.constexpr, LOGPROBS: tl.constexpr, KEEP_SCORES: tl.constexpr, FILTERS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    i_tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles, rows = tl.num_programs(0), tl.num_programs(1).to(tl.int64)
    i_row, i_block = row // block, row % block
    p_stats += row * tiles + i_tile
    plane = rows * tiles
    offset = i_tile * TILE + tl.arange(0, TILE)
    mask = offset < vocab

    b_scores = load_member(p_members, s_member_rows, s_member_blocks, 0, i_row, i_block, offset, mask)
    flags = faulty(b_scores) << 1
    if LOGPROBS:
        peak = tl.max(b_scores, axis=0)
        tl.store(p_stats + 2 * plane, peak)
        tl.store(p_stats + 3 * plane, exp_sum(b_scores, peak, LOG2E))
    for i in tl.static_range(1, len(p_members)):
        b_arm = load_member(p_members, s_member_rows, s_member_blocks, i, i_row, i_block, offset, mask)
        flags |= faulty(b_arm) << (i + 1)
        if LOGPROBS:
            peak = tl.max(b_arm, axis=0)
            tl.store(p_stats + (2 + 2 * i) * plane, peak)
            tl.store(p_stats + (3 + 2 * i) * plane, exp_sum(b_arm, peak, LOG2E))
        b_scores = add_member(b_scores, b_arm, p_weights, s_weights, i, i_row, NUMBERS)
    if BIAS:
        b_scores += tl.load(p_bias + i_row * s_bias + offset, mask=mask, other=0.0)
    flags |= faulty(b_scores)

    temperature = parameter(p_parameters, s_rows, s_blocks, TEMPERATURE, i_row, i_block, NUMBERS)
    peak = tl.max(b_scores, axis=0)
    b_weights = weights_below(b_scores, peak, coldness_of(temperature) * LOG2E)
    tl.store(p_stats, peak)
    tl.store(p_stats + plane, tl.sum(b_weights, axis=0))
    tl.store(p_flags + row * tiles + i_tile, flags)
    if KEEP_SCORES:
        tl.store(p_scores + row * tiles * TILE + offset, b_scores)
    if FILTERS:
        p_groups += (row * tiles + i_tile) * GROUPS + tl.arange(0, GROUPS)
        tl.store(p_groups, tl.max(tl.reshape(b_scores, [GROUPS, TILE // GROUPS]), axis=1))
        tl.store(p_groups + plane * GROUPS, tl.sum(tl.reshape(b_weights, [GROUPS, TILE // GROUPS]), axis=1))


@triton.jit(do_not_specialize=["p_weights", "p_parameters"])
def draw_kernel(
    p_members, s_member_rows, s_member_blocks, p_weights, s_weights, p_bias, s_bias, p_parameters, s_rows, s_blocks,
    p_stats, p_flags, p_bounds, p_places, p_found, p_tokens, p_status, p_logprobs, p_member_logprobs,
    block, vocab, tiles,
    BIAS: tl.constexpr, LOGPROBS: tl.constexpr, FILTERS: tl.constexpr, BLOCK: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    i_row, i_block = row // block, row % block
    temperature = parameter(p_parameters, s_rows, s_blocks, TEMPERATURE, i_row, i_block, NUMBERS)
    seed = parameter(p_parameters, s_rows, s_blocks, SEED, i_row, i_block, NUMBERS)
    position = parameter(p_parameters, s_rows, s_blocks, POSITION, i_row, i_block, NUMBERS)
    coldness = coldness_of(temperature)
    o_tiles = tl.arange(0, BLOCK)
    m_tiles = o_tiles < tiles
    p_stats += row * tiles
    plane = rows * tiles
    b_peaks = tl.load(p_stats + o_tiles, mask=m_tiles, other=-INF)
    b_sums = tl.load(p_stats + plane + o_tiles, mask=m_tiles, other=0.0)
    b_flags = tl.load(p_flags + row * tiles + o_tiles, mask=m_tiles, other=0)
    peak = tl.max(b_peaks, axis=0)
    status = tl.max(b_flags & 1, axis=0) | (peak == -INF).to(tl.int32)
    broken = tl.zeros([], tl.int32)
    for i in tl.static_range(len(p_members)):
        broken |= tl.max(b_flags & (2 << i), axis=0)
    status = tl.where(broken == 0, status, broken)

    lowest = tl.full([], -INF, tl.float32)
    b_values = (b_peaks - peak) * coldness
    b_kept, b_total = b_sums, tl.sum(tl.where(b_peaks == -INF, 0.0, b_sums * tl.exp2(b_values * LOG2E)), axis=0)
    b_shares = b_values + tl.log(b_sums)
    if FILTERS:
        bound = tl.load(p_bounds + row)
        if bound < INF:
            top_k = parameter(p_parameters, s_rows, s_blocks, TOP_K, i_row, i_block, NUMBERS)
            top_p = parameter(p_parameters, s_rows, s_blocks, TOP_P, i_row, i_block, NUMBERS)
            min_p = parameter(p_parameters, s_rows, s_blocks, MIN_P, i_row, i_block, NUMBERS)
            lowest, b_kept = filtered(
                p_found + row * tiles * TILE, p_places + row * (tiles + 1), bound, b_total, temperature, top_k, top_p,
                min_p, vocab, tiles, peak, BLOCK,
            )  # fmt: skip
            b_shares = tl.log(b_kept)
    b_noisy = b_shares + gumbel(seed, _TILE_LEVEL, position, o_tiles)
    b_noisy = tl.where((b_kept > 0) & (b_peaks > -INF), b_noisy, -INF)
    i_tile = tl.argmax(tl.where(temperature == 0, b_peaks, b_noisy), axis=0)

    offset = i_tile * TILE + tl.arange(0, TILE)
    b_scores = combined(
        p_members, s_member_rows, s_member_blocks, p_weights, s_weights, p_bias, s_bias, i_row, i_block, offset,
        offset < vocab, BIAS, NUMBERS,
    )  # fmt: skip
    b_noisy = (b_scores - peak) * coldness + gumbel(seed, _TOKEN_LEVEL, position, offset)
    b_noisy = tl.where((b_scores >= lowest) & (b_scores > -INF), b_noisy, -INF)
    i_token = tl.argmax(tl.where(temperature == 0, b_scores, b_noisy), axis=0)
    token = tl.where(status == 0, i_tile * TILE + i_token, 0)
    tl.store(p_tokens + row, token.to(tl.int64))
    tl.store(p_status + row, status)

    if LOGPROBS:
        score = tl.max(tl.where(tl.arange(0, TILE) == i_token, b_scores, -INF), axis=0)
        logprob = (score - peak) * coldness - tl.log(b_total)
        tl.store(p_logprobs + row, tl.where(status == 0, logprob, float("nan")))
        for i in tl.static_range(len(p_members)):
            b_peaks = tl.load(p_stats + (2 + 2 * i) * plane + o_tiles, mask=m_tiles, other=-INF)
            b_sums = tl.load(p_stats + (3 + 2 * i) * plane + o_tiles, mask=m_tiles, other=0.0)
            peak = tl.max(b_peaks, axis=0)
            b_sums = tl.where(b_peaks == -INF, 0.0, b_sums * tl.exp2((b_peaks - peak) * LOG2E))
            p_logit = p_members[i] + i_row * s_member_rows[i] + i_block * s_member_blocks[i] + token
            logprob = tl.load(p_logit).to(tl.float32) - peak - tl.log(tl.sum(b_sums, axis=0))
            tl.store(p_member_logprobs + i * rows + row, tl.where(status == 0, logprob, float("nan")))
