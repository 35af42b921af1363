"""ragged_attention and ragged_append on a GPU, in Triton: the maths are in reference.py.

    attend    grid (rows · tiles, key-value heads, splits)   softmax over a split's entries, online
    combine   grid (rows · queries · heads)                  only with splits: their average, weighted by their sums
    append    grid (rows · queries, key-value heads)         a token's keys and values to its entry

A tile's rows are queries times the heads of a group, so that keys are read once for all of them, straight from the
cache. Positions are read on the device; the host's `limit` decides nothing but how many splits there are (plan.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _native
from .._tensors import in_memory, launching_on
from .plan import plan, power_of_two

LOG2E = 1.4426950408889634
INF = tl.constexpr(float("inf"))
SPLITS_AT_ONCE = tl.constexpr(8)


@triton.jit
def attend_span(
    b_sums, b_peaks, b_totals, b_query, b_positions, first, begin, end, stop, p_keys, s_keys, s_key_width,
    p_values, s_values, s_value_width, scale, softcap, window,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, MANY: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """The tile's sums, peaks and totals with the entries begin .. end - 1; those from `stop` on do not exist."""
    o_entries = tl.arange(0, BLOCK_N)
    o_width, o_value_width = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    p_keys += begin.to(tl.int64) * s_keys
    p_values += begin.to(tl.int64) * s_values
    for start in range(begin, end, BLOCK_N):
        entries = start + o_entries
        m_entries = entries < stop
        if WINDOW:
            m_entries = m_entries & (entries > first - window)
        m_keys = o_width[:, None] < D
        m_values = o_value_width[None, :] < DV
        if MASKED:
            m_keys = m_keys & m_entries[None, :]
            m_values = m_values & m_entries[:, None]
        b_keys = tl.load(p_keys + o_entries[None, :] * s_keys + o_width[:, None] * s_key_width, mask=m_keys, other=0.0)
        b_values = tl.load(
            p_values + o_entries[:, None] * s_values + o_value_width[None, :] * s_value_width, mask=m_values, other=0.0
        )
        p_keys += BLOCK_N * s_keys
        p_values += BLOCK_N * s_values
        b_scores = tl.dot(b_query, b_keys, input_precision=precision) * scale
        if SOFTCAP:  # scale has 2 / softcap in it: tanh(x) = 1 - 2 / (1 + exp(2 x))
            b_scores = softcap - 2 * softcap / (1 + tl.exp2(b_scores))
        if MASKED:
            m_seen = m_entries[None, :] & (entries[None, :] <= b_positions[:, None])
            if WINDOW:
                m_seen = m_seen & (entries[None, :] > b_positions[:, None] - window)
            b_scores = tl.where(m_seen, b_scores, -INF)
        b_new = tl.maximum(b_peaks, tl.max(b_scores, axis=1))
        b_peak = tl.where(b_new == -INF, 0.0, b_new)  # rows that have seen nothing yet
        b_weights = tl.exp2(b_scores - b_peak[:, None])
        b_fade = tl.exp2(b_peaks - b_peak)
        b_totals = b_totals * b_fade + tl.sum(b_weights, axis=1)
        b_sums = b_sums * b_fade[:, None]
        if MASKED and MANY:  # 0 · NaN is NaN: an entry that only some queries see must not reach the others
            m_bad = ~(tl.abs(b_values.to(tl.float32)) < INF)
            b_values = tl.where(m_bad, 0.0, b_values).to(b_values.dtype)
            b_bad = tl.max(m_bad.to(tl.int32), axis=1)
            b_met = tl.max(tl.where((b_weights > 0) & (b_bad[None, :] > 0), 1, 0), axis=1)
            b_totals = tl.where(b_met > 0, float("nan"), b_totals)
        b_sums = tl.dot(b_weights.to(b_values.dtype), b_values, b_sums, input_precision=precision)
        b_peaks = b_new
    return b_sums, b_peaks, b_totals


@triton.jit
def attend_kernel(
    p_query, s_query_row, s_query_head, s_query_token, s_query_width,
    p_keys, s_key_slot, s_key_head, s_keys, s_key_width,
    p_values, s_value_slot, s_value_head, s_values, s_value_width,
    p_slots, p_positions,
    p_out,  # [rows · queries · heads, DV], or [rows · queries · heads, splits, DV] in float32
    p_logs,  # [rows · queries · heads, splits]: log2 of the sums of exponentials
    heads, group, block, capacity, tiles, scale, softcap, window,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr,
    SPLIT: tl.constexpr, BLOCKED: tl.constexpr, MANY: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    IEEE: tl.constexpr,
):  # fmt: skip
    row, i_head, i_split = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    splits = tl.num_programs(2)
    folded = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)  # the longest tiles first
    b_token, b_head = (folded // group).to(tl.int64), i_head * group + folded % group
    m_rows = b_token < block
    b_positions = tl.load(p_positions + row * block + b_token, mask=m_rows, other=-1).to(tl.int32)
    last = tl.max(b_positions, axis=0)
    first = tl.min(tl.where(m_rows, b_positions, last), axis=0)
    stop = tl.minimum(last + 1, capacity)
    begin = tl.zeros([], tl.int32)
    if WINDOW:
        begin = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    end = stop
    if SPLIT:
        chunk = tl.maximum(LEAST, tl.cdiv(stop - begin, splits * BLOCK_N) * BLOCK_N)
        begin += i_split * chunk
        end = tl.minimum(begin + chunk, stop)

    slot = tl.load(p_slots + row)
    p_keys += slot * s_key_slot + i_head * s_key_head
    p_values += slot * s_value_slot + i_head * s_value_head
    o_width, o_value_width = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    b_query = tl.load(
        p_query
        + row * s_query_row
        + (b_head * s_query_head + b_token * s_query_token)[:, None]
        + o_width[None, :] * s_query_width,
        mask=m_rows[:, None] & (o_width[None, :] < D),
        other=0.0,
    )
    b_peaks = tl.full([BLOCK_M], -INF, tl.float32)
    b_totals = tl.zeros([BLOCK_M], tl.float32)
    b_sums = tl.zeros([BLOCK_M, VALUE_WIDTH], tl.float32)
    if BLOCKED:
        whole = tl.maximum(begin, tl.minimum(first + 1, end) // BLOCK_N * BLOCK_N)
        b_sums, b_peaks, b_totals = attend_span(
            b_sums, b_peaks, b_totals, b_query, b_positions, first, begin, whole, stop,
            p_keys, s_keys, s_key_width, p_values, s_values, s_value_width, scale, softcap, window,
            D, DV, WIDTH, VALUE_WIDTH, BLOCK_N, False, MANY, WINDOW, SOFTCAP, IEEE,
        )  # fmt: skip
        begin_masked = whole
    else:
        begin_masked = begin
    b_sums, b_peaks, b_totals = attend_span(
        b_sums, b_peaks, b_totals, b_query, b_positions, first, begin_masked, end, stop,
        p_keys, s_keys, s_key_width, p_values, s_values, s_value_width, scale, softcap, window,
        D, DV, WIDTH, VALUE_WIDTH, BLOCK_N, True, MANY, WINDOW, SOFTCAP, IEEE,
    )  # fmt: skip

    m_out = m_rows[:, None] & (o_value_width[None, :] < DV)
    o_out = (row * block + b_token) * heads + b_head
    if SPLIT:
        o_out = o_out * splits + i_split
        b_logs = tl.where(b_totals == 0, -INF, b_peaks + tl.log2(b_totals))
        tl.store(p_logs + o_out, b_logs, mask=m_rows)
        m_out = m_out & (begin < end)
    b_out = b_sums / tl.where(b_totals == 0, 1.0, b_totals)[:, None]
    tl.store(p_out + o_out[:, None] * DV + o_value_width[None, :], b_out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def combine_kernel(p_parts, p_logs, p_out, splits, DV: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    o_splits, o_width = tl.arange(0, BLOCK), tl.arange(0, VALUE_WIDTH)
    p_logs += row * splits
    b_logs = tl.load(p_logs + o_splits, mask=o_splits < splits, other=-INF)
    peak = tl.max(b_logs, axis=0)
    total = tl.sum(tl.exp2(b_logs - peak), axis=0)
    b_sums = tl.zeros([VALUE_WIDTH], tl.float32)
    for start in range(0, splits, SPLITS_AT_ONCE):
        split = start + tl.arange(0, SPLITS_AT_ONCE)
        b_some = tl.load(p_logs + split, mask=split < splits, other=-INF)
        m_parts = (b_some != -INF)[:, None] & (o_width[None, :] < DV)  # splits without entries wrote nothing else
        b_parts = tl.load(p_parts + (row * splits + split)[:, None] * DV + o_width[None, :], mask=m_parts, other=0.0)
        b_sums += tl.sum(b_parts * tl.exp2(b_some - peak)[:, None], axis=0)
    tl.store(p_out + row * DV + o_width, (b_sums / total).to(p_out.dtype.element_ty), mask=o_width < DV)


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


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    limit: int | None,
) -> Tensor | None:
    """Launch for checked arguments; None for dtypes that the kernels do not read. Reads nothing back."""
    if query.dtype not in _native.DTYPES:
        return None
    rows, heads, block, width = query.shape
    kv_heads, capacity, value_width = values.shape[1:]
    group, device = heads // kv_heads, query.device
    query, keys, values = map(in_memory, (query, keys, values))
    slots, positions = in_memory(slots).contiguous(), in_memory(positions).contiguous()
    size = (width, value_width)
    cut = plan(rows, kv_heads, group, block, size, capacity if limit is None else limit, window, query.dtype)
    out = torch.empty(rows, block, heads, value_width, dtype=query.dtype, device=device)
    parts, logs = out, out  # nothing reads or writes the second without splits
    if cut.splits > 1:
        parts = torch.empty(rows * block * heads, cut.splits, value_width, dtype=torch.float32, device=device)
        logs = torch.empty(rows * block * heads, cut.splits, dtype=torch.float32, device=device)
    cap = 0.0 if softcap is None else float(softcap) * LOG2E
    factor = float(scale) * LOG2E * (1.0 if softcap is None else 2.0 / float(softcap))
    with launching_on(device):
        attend_kernel[(rows * cut.tiles, kv_heads, cut.splits)](
            query, *query.stride(), keys, *keys.stride(), values, *values.stride(), slots, positions, parts, logs,
            heads, group, block, capacity, cut.tiles, factor, cap, window or 0,
            D=width, DV=value_width, WIDTH=cut.width, VALUE_WIDTH=cut.value_width,
            BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, LEAST=cut.chunk, SPLIT=cut.splits > 1, BLOCKED=cut.blocked,
            MANY=block > 1, WINDOW=window is not None, SOFTCAP=softcap is not None, IEEE=query.dtype == torch.float32,
            num_warps=cut.warps, num_stages=2,
        )  # fmt: skip
        if cut.splits > 1:
            combine_kernel[(rows * block * heads,)](
                parts, logs, out, cut.splits,
                DV=value_width, VALUE_WIDTH=cut.value_width, BLOCK=power_of_two(cut.splits), num_warps=1,
            )  # fmt: skip
    return out


def append(
    keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, slots: Tensor, positions: Tensor
) -> bool | None:
    """Launch for checked arguments; None for dtypes that the kernel does not write, or caches of the negative bit."""
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
