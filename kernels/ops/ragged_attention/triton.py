"""ragged_attention on a GPU, in Triton: the maths are in reference.py.

    attend    grid (rows · tiles, key-value heads, splits)   online softmax over the entries of a split
    combine   grid (rows · queries · heads)                  average of the splits, weighted by their sums; only without
                                                             `arrivals`

A tile's rows are queries times the heads of a group, so that keys are read once for all of them, directly from the
cache. Positions are read on the device. The host's `limit` only decides how many splits there are (plan.py). With
`arrivals`, the program of a tile that ends last averages all splits of the tile. It does so in their order, so the
result's bits do not depend on which program is last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _native
from .._tensors import in_memory, launching_on
from .plan import DECODE, plan, power_of_two

LOG2E = 1.4426950408889634
INF = tl.constexpr(float("inf"))
SPLITS_AT_ONCE = 8  # splits that `combine` reads at once
AVERAGED = 2048  # numbers that `attend` reads at once when it averages: splits times rows of the tile times width


@triton.jit
def attend_span(
    b_sums, b_peaks, b_totals, b_query, b_positions, first, begin, end, stop, p_keys, s_keys, s_key_width,
    p_values, s_values, s_value_width, scale, softcap, window,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, MANY: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Return the tile's sums, peaks and totals after the entries begin .. end - 1. Those from `stop` on do not exist.

    b_sums: [rows, VALUE_WIDTH], weighted sums of values; b_peaks: [rows], maxima of scores; b_totals: [rows], sums of
    weights. Weights are 2^(score - peak).
    """
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
        if SOFTCAP:  # scale contains 2 / softcap, for tanh(x) = 1 - 2 / (1 + exp(2 x))
            b_scores = softcap - 2 * softcap / (1 + tl.exp2(b_scores))
        if MASKED:
            m_seen = m_entries[None, :] & (entries[None, :] <= b_positions[:, None])
            if WINDOW:
                m_seen = m_seen & (entries[None, :] > b_positions[:, None] - window)
            b_scores = tl.where(m_seen, b_scores, -INF)
        b_new = tl.maximum(b_peaks, tl.max(b_scores, axis=1))
        b_peak = tl.where(b_new == -INF, 0.0, b_new)  # -inf: the row has seen no entry yet
        b_weights = tl.exp2(b_scores - b_peak[:, None])
        b_fade = tl.exp2(b_peaks - b_peak)
        b_totals = b_totals * b_fade + tl.sum(b_weights, axis=1)
        b_sums = b_sums * b_fade[:, None]
        if MASKED and MANY:  # 0 · NaN is NaN: an entry that only some queries see must not change the other queries
            m_bad = ~(tl.abs(b_values.to(tl.float32)) < INF)
            b_values = tl.where(m_bad, 0.0, b_values).to(b_values.dtype)
            b_bad = tl.max(m_bad.to(tl.int32), axis=1)
            b_met = tl.max(tl.where((b_weights > 0) & (b_bad[None, :] > 0), 1, 0), axis=1)
            b_totals = tl.where(b_met > 0, float("nan"), b_totals)
        b_sums = tl.dot(b_weights.to(b_values.dtype), b_values, b_sums, input_precision=precision)
        b_peaks = b_new
    return b_sums, b_peaks, b_totals


@triton.jit
def averaged(
    p_parts, p_logs, b_rows, m_rows, splits,
    DV: tl.constexpr, VALUE_WIDTH: tl.constexpr, AT_ONCE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return the average of the splits of each row in b_rows (int32), weighted by 2^log: [ROWS, VALUE_WIDTH].

    p_parts: [rows, splits, DV]; p_logs: [rows, splits]. The average is computed online, AT_ONCE splits at a time: up to
    [64, 128] logs at once spilled registers beside the sums.
    """
    o_width, b_first = tl.arange(0, VALUE_WIDTH), b_rows[:, None] * splits
    b_peaks = tl.full([ROWS], -INF, tl.float32)
    b_totals = tl.zeros([ROWS], tl.float32)
    b_sums = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for start in range(0, splits, AT_ONCE):
        o_some = start + tl.arange(0, AT_ONCE)
        b_some = tl.load(
            p_logs + b_first + o_some[None, :], mask=m_rows[:, None] & (o_some[None, :] < splits), other=-INF
        )
        # A split without entries has written only its log, -inf.
        m_parts = (b_some != -INF)[:, :, None] & (o_width[None, None, :] < DV)
        o_parts = (b_first + o_some[None, :])[:, :, None] * DV + o_width[None, None, :]
        b_parts = tl.load(p_parts + o_parts, mask=m_parts, other=0.0)
        b_new = tl.maximum(b_peaks, tl.max(b_some, axis=1))
        b_peak = tl.where(b_new == -INF, 0.0, b_new)  # -inf: no split so far had entries
        b_shares = tl.exp2(b_some - b_peak[:, None])
        b_fade = tl.exp2(b_peaks - b_peak)
        b_totals = b_totals * b_fade + tl.sum(b_shares, axis=1)
        b_sums = b_sums * b_fade[:, None] + tl.sum(b_parts * b_shares[:, :, None], axis=1)
        b_peaks = b_new
    return b_sums / b_totals[:, None]


@triton.jit
def attend_kernel(
    p_query, s_query_row, s_query_head, s_query_token, s_query_width,
    p_keys, s_key_slot, s_key_head, s_keys, s_key_width,
    p_values, s_value_slot, s_value_head, s_values, s_value_width,
    p_slots, p_positions,
    p_out,  # [rows · queries · heads, DV]
    p_parts,  # [rows · queries · heads, splits, DV] in float32; p_out if there is one split
    p_logs,  # [rows · queries · heads, splits]: log2 of the sums of exponentials
    p_arrivals,  # [rows · tiles · key-value heads]: zeros before and after the launch
    heads, group, block, capacity, tiles, scale, softcap, window,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr,
    SPLIT: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCKED: tl.constexpr, MANY: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    IEEE: tl.constexpr,
):  # fmt: skip
    row, i_head, i_split = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    splits = tl.num_programs(2)
    folded_from = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M  # tiles with the most entries start first
    folded = folded_from + tl.arange(0, BLOCK_M)
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
    tl.store(p_parts + o_out[:, None] * DV + o_value_width[None, :], b_out.to(p_parts.dtype.element_ty), mask=m_out)
    if COUNTED:
        p_arrivals += tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.debug_barrier()  # all threads' stores come before the arrival, which one thread announces
        if tl.atomic_add(p_arrivals, 1, sem="acq_rel", scope="gpu") == splits - 1:
            own, before = folded_from + tl.arange(0, ROWS), row * block * heads
            b_rows = own // group * heads + tl.program_id(1) * group + own % group
            m_own = own // group < block
            p_logs += before * splits
            p_parts += before * splits * DV
            p_out += before * DV
            b_all = averaged(p_parts, p_logs, b_rows, m_own, splits, DV, VALUE_WIDTH, AT_ONCE, ROWS)
            o_all = b_rows[:, None] * DV + o_value_width[None, :]
            m_all = m_own[:, None] & (o_value_width[None, :] < DV)
            tl.store(p_out + o_all, b_all.to(p_out.dtype.element_ty), mask=m_all)
            tl.store(p_arrivals, 0)  # for the next launch


@triton.jit
def combine_kernel(
    p_parts, p_logs, p_out, splits,
    DV: tl.constexpr, VALUE_WIDTH: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    row, b_row, o_width = tl.program_id(0).to(tl.int64), tl.arange(0, 1), tl.arange(0, VALUE_WIDTH)[None, :]
    p_logs += row * splits
    p_parts += row * splits * DV
    b_out = averaged(p_parts, p_logs, b_row, b_row == 0, splits, DV, VALUE_WIDTH, AT_ONCE, 1)
    tl.store(p_out + row * DV + o_width, b_out.to(p_out.dtype.element_ty), mask=o_width < DV)


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
    arrivals: Tensor | None = None,
) -> Tensor | None:
    """Launch for checked arguments; None for dtypes that the kernels do not read. Nothing is read back to the host."""
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
    parts, logs, split = out, out, cut.splits > 1  # with one split, logs is neither read nor written
    if split:
        parts = torch.empty(rows * block * heads, cut.splits, value_width, dtype=torch.float32, device=device)
        logs = torch.empty(rows * block * heads, cut.splits, dtype=torch.float32, device=device)
    counters = 0 if arrivals is None or block > DECODE or not ordered(device) else len(arrivals)
    counted = split and counters >= rows * cut.tiles * kv_heads
    own = min(cut.block_m, power_of_two(block * group))
    at_once = max(1, min(power_of_two(cut.splits), AVERAGED // (own * cut.value_width)))
    cap = 0.0 if softcap is None else float(softcap) * LOG2E
    factor = float(scale) * LOG2E * (1.0 if softcap is None else 2.0 / float(softcap))
    with launching_on(device):
        attend_kernel[(rows * cut.tiles, kv_heads, cut.splits)](
            query, *query.stride(), keys, *keys.stride(), values, *values.stride(), slots, positions,
            out, parts, logs, arrivals if counted else out,
            heads, group, block, capacity, cut.tiles, factor, cap, window or 0,
            D=width, DV=value_width, WIDTH=cut.width, VALUE_WIDTH=cut.value_width,
            BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, LEAST=cut.chunk,
            SPLIT=split, COUNTED=counted, ROWS=own, AT_ONCE=at_once,
            BLOCKED=cut.blocked, MANY=block > 1, WINDOW=window is not None, SOFTCAP=softcap is not None,
            IEEE=query.dtype == torch.float32, num_warps=cut.warps, num_stages=2,
        )  # fmt: skip
        if split and not counted:
            combine_kernel[(rows * block * heads,)](
                parts, logs, out, cut.splits,
                DV=value_width, VALUE_WIDTH=cut.value_width, AT_ONCE=SPLITS_AT_ONCE, num_warps=1,
            )  # fmt: skip
    return out


def ordered(device: torch.device) -> bool:
    """Whether a barrier orders the stores of all of a program's threads before the next operation of one thread.

    CUDA's barrier does. ROCm's barrier, compiled for gfx942, is `s_barrier` without a wait for stores. Nothing is known
    about XPU's.
    """
    return torch.version.hip is None and device.type != "xpu"
