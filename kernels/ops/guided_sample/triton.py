"""guided_sample on a GPU, in Triton: the maths are in reference.py.

    scores     grid (tiles, rows)   one read of every logit → (max, sum) per tile; for log-probs, of each member
    gather     grid (rows)          only with filters: the scores that top-k and top-p may keep, a few hundred mostly
    threshold  grid (rows)          only with filters: the lowest score kept, by bisection over float32's own ordering
    kept       grid (tiles, rows)   only with filters: each tile's sum over the scores kept
    draw       grid (rows)          the tile, the token, and their log-probabilities

One warp takes one tile, so that its reductions stay in registers and a single row still fills a GPU. What a kernel
writes, only later ones read: that needs no atomics, no zeroed memory and no fences (docs/triton.md, "Why launches").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tensors import dense, in_memory, launching_on
from ..philox import seed_tensor
from .arguments import DTYPES, OFF, SamplingArguments
from .reference import GuidedSample
from .triton_common import (
    _TILE_LEVEL,
    _TOKEN_LEVEL,
    COLDEST,
    GROUPS,
    INF,
    LOG2E,
    POSITION,
    SEED,
    TEMPERATURE,
    TILE,
    add_member,
    coldness_of,
    exp_sum,
    faulty,
    gumbel,
    load_member,
    parameter,
)
from .triton_filters import gather_kernel, kept_kernel, threshold_kernel

DTYPES_OF_LOGITS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def scores_kernel(
    p_members,
    s_rows,
    s_blocks,
    p_weights,
    s_weights,
    p_bias,
    s_bias,
    p_temperature,
    s_temperature_row,
    s_temperature_block,
    p_stats,  # [2 + 2 · members, rows, tiles]: peaks, sums, then those of each member
    p_flags,  # [rows, tiles]: the row's status as this tile sees it
    p_scores,  # [rows, tiles · TILE]
    p_peaks,  # [rows, tiles · GROUPS]
    block,
    vocab,
    BIAS: tl.constexpr,
    LOGPROBS: tl.constexpr,
    KEEP_SCORES: tl.constexpr,
):
    i_tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles, rows = tl.num_programs(0), tl.num_programs(1).to(tl.int64)
    i_row, i_block = row // block, row % block
    p_stats += row * tiles + i_tile
    plane = rows * tiles
    offset = i_tile * TILE + tl.arange(0, TILE)
    mask = offset < vocab

    b_scores = load_member(p_members, s_rows, s_blocks, 0, i_row, i_block, offset, mask)
    flags = faulty(b_scores) << 1
    if LOGPROBS:
        peak = tl.max(b_scores, axis=0)
        tl.store(p_stats + 2 * plane, peak)
        tl.store(p_stats + 3 * plane, exp_sum(b_scores, peak, LOG2E))
    for i in tl.static_range(1, len(p_members)):
        b_arm = load_member(p_members, s_rows, s_blocks, i, i_row, i_block, offset, mask)
        flags |= faulty(b_arm) << (i + 1)
        if LOGPROBS:
            peak = tl.max(b_arm, axis=0)
            tl.store(p_stats + (2 + 2 * i) * plane, peak)
            tl.store(p_stats + (3 + 2 * i) * plane, exp_sum(b_arm, peak, LOG2E))
        b_scores = add_member(b_scores, b_arm, tl.load(p_weights + i_row * s_weights + i - 1))
    if BIAS:
        b_scores += tl.load(p_bias + i_row * s_bias + offset, mask=mask, other=0.0)
    flags |= faulty(b_scores)

    temperature = tl.load(p_temperature + i_row * s_temperature_row + i_block * s_temperature_block)
    peak = tl.max(b_scores, axis=0)
    tl.store(p_stats, peak)
    tl.store(p_stats + plane, exp_sum(b_scores, peak, coldness_of(temperature) * LOG2E))
    tl.store(p_flags + row * tiles + i_tile, flags)
    if KEEP_SCORES:
        tl.store(p_scores + row * tiles * TILE + offset, b_scores)
        b_peaks = tl.max(tl.reshape(b_scores, [GROUPS, TILE // GROUPS]), axis=1)
        tl.store(p_peaks + (row * tiles + i_tile) * GROUPS + tl.arange(0, GROUPS), b_peaks)


@triton.jit
def draw_kernel(
    p_members,
    s_member_rows,
    s_member_blocks,
    p_weights,
    s_weights,
    p_bias,
    s_bias,
    p_parameters,
    s_rows,
    s_blocks,
    p_stats,
    p_flags,
    p_lowest,
    p_kept,  # [rows, tiles]
    p_tokens,
    p_status,
    p_logprobs,
    p_member_logprobs,
    block,
    vocab,
    tiles,
    BIAS: tl.constexpr,
    LOGPROBS: tl.constexpr,
    FILTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    i_row, i_block = row // block, row % block
    temperature = parameter(p_parameters, s_rows, s_blocks, TEMPERATURE, i_row, i_block)
    seed = parameter(p_parameters, s_rows, s_blocks, SEED, i_row, i_block)
    position = parameter(p_parameters, s_rows, s_blocks, POSITION, i_row, i_block)
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

    lowest = -INF
    b_values = (b_peaks - peak) * coldness
    b_total = tl.where(b_peaks == -INF, 0.0, b_sums * tl.exp2(b_values * LOG2E))
    if FILTERS:
        lowest = tl.load(p_lowest + row)
        b_sums = tl.load(p_kept + row * tiles + o_tiles, mask=m_tiles, other=0.0)
    b_noisy = b_values + tl.log(b_sums) + gumbel(seed, _TILE_LEVEL, position, o_tiles)
    b_noisy = tl.where((b_sums > 0) & (b_peaks > -INF), b_noisy, -INF)
    i_tile = tl.argmax(tl.where(temperature == 0, b_peaks, b_noisy), axis=0)

    offset = i_tile * TILE + tl.arange(0, TILE)
    mask = offset < vocab
    b_scores = load_member(p_members, s_member_rows, s_member_blocks, 0, i_row, i_block, offset, mask)
    for i in tl.static_range(1, len(p_members)):
        b_arm = load_member(p_members, s_member_rows, s_member_blocks, i, i_row, i_block, offset, mask)
        b_scores = add_member(b_scores, b_arm, tl.load(p_weights + i_row * s_weights + i - 1))
    if BIAS:
        b_scores += tl.load(p_bias + i_row * s_bias + offset, mask=mask, other=0.0)
    b_noisy = (b_scores - peak) * coldness + gumbel(seed, _TOKEN_LEVEL, position, offset)
    b_noisy = tl.where((b_scores >= lowest) & (b_scores > -INF), b_noisy, -INF)
    i_token = tl.argmax(tl.where(temperature == 0, b_scores, b_noisy), axis=0)
    token = tl.where(status == 0, i_tile * TILE + i_token, 0)
    tl.store(p_tokens + row, token.to(tl.int64))
    tl.store(p_status + row, status)

    if LOGPROBS:
        score = tl.max(tl.where(tl.arange(0, TILE) == i_token, b_scores, -INF), axis=0)
        logprob = (score - peak) * coldness - tl.log(tl.sum(b_total, axis=0))
        tl.store(p_logprobs + row, tl.where(status == 0, logprob, float("nan")))
        for i in tl.static_range(len(p_members)):
            b_peaks = tl.load(p_stats + (2 + 2 * i) * plane + o_tiles, mask=m_tiles, other=-INF)
            b_sums = tl.load(p_stats + (3 + 2 * i) * plane + o_tiles, mask=m_tiles, other=0.0)
            peak = tl.max(b_peaks, axis=0)
            b_sums = tl.where(b_peaks == -INF, 0.0, b_sums * tl.exp2((b_peaks - peak) * LOG2E))
            p_logit = p_members[i] + i_row * s_member_rows[i] + i_block * s_member_blocks[i] + token
            logprob = tl.load(p_logit).to(tl.float32) - peak - tl.log(tl.sum(b_sums, axis=0))
            tl.store(p_member_logprobs + i * rows + row, tl.where(status == 0, logprob, float("nan")))


def launch(arguments: SamplingArguments) -> GuidedSample | None:
    """Launch the kernels for checked arguments; None for logits of dtypes that they do not read.

    Reads nothing back, so that a graph can capture it; parameters that are numbers are copied to the device first.
    Filters given as tensors are searched for even where no row uses them; filters that are off launch nothing.
    """
    base, logit_bias, top_logprobs = arguments.base_logits, arguments.logit_bias, arguments.top_logprobs
    members = (base, *arguments.arm_logits)
    if not all(logits.dtype in DTYPES_OF_LOGITS for logits in members):
        return None
    device, shape, vocab_size = base.device, base.shape[:-1], arguments.vocabulary
    rows, tiles = shape.numel(), triton.cdiv(vocab_size, TILE.value)
    block = shape[1] if len(shape) == 2 else 1
    logprobs = arguments.return_logprobs or top_logprobs > 0
    filters = any(arguments.filtering(name) for name in OFF)
    keep_scores = filters or top_logprobs > 0

    def strides(tensors: Sequence[Tensor], trailing: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Row and block strides; `trailing` dimensions are not rows."""
        padded = [(*(tensor.stride()[: tensor.ndim - trailing]), 0, 0) for tensor in tensors]
        return tuple(s[0] for s in padded), tuple(s[1] for s in padded)

    def on_device(name: str) -> Tensor:
        value, dtype = getattr(arguments, name), DTYPES[name]
        if isinstance(value, Tensor):
            return in_memory(value.to(device, dtype))
        return torch.full((), OFF[name] if value is None else value, dtype=dtype, device=device)

    members = tuple(map(dense, members))
    member_strides = strides(members, 1)
    if not isinstance(arguments.seeds, Tensor):
        arguments = arguments._replace(seeds=int(seed_tensor([int(arguments.seeds)])))
    seeds, positions, temperature = (on_device(name) for name in ("seeds", "positions", "temperature"))
    # Without filters nothing reads theirs: tensors of the same dtypes stand in, which costs no launch.
    top_k, top_p, min_p = map(on_device, OFF) if filters else (positions, temperature, temperature)
    parameters = (temperature, top_k, top_p, min_p, seeds, positions)
    parameter_strides = strides(parameters, 0)
    weights = dense(torch.as_tensor(arguments.weights, dtype=torch.float32, device=device))
    s_weights = weights.stride(0) if weights.ndim == 2 else 0
    bias = weights if logit_bias is None else dense(logit_bias.to(device, torch.float32))
    s_bias = bias.stride(0) if logit_bias is not None and bias.ndim == 2 else 0

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    stats = empty(2 + 2 * len(members) * logprobs, rows, tiles)
    flags = empty(rows, tiles, dtype=torch.int32)
    scores = empty(rows, tiles * TILE.value) if keep_scores else stats
    peaks = empty(rows, tiles * GROUPS.value) if keep_scores else stats
    lowest, kept = (empty(rows), empty(rows, tiles)) if filters else (stats, stats)
    outputs = [empty(*shape, dtype=torch.int64), empty(*shape, dtype=torch.int32)]
    if logprobs:
        outputs += [empty(*shape), empty(len(members), *shape)]
    common = {"BIAS": logit_bias is not None, "LOGPROBS": logprobs, "enable_fp_fusion": False}
    tile_block = triton.next_power_of_2(tiles)
    sources = (members, *member_strides, weights, s_weights, bias, s_bias)
    with launching_on(device):
        scores_kernel[(tiles, rows)](
            *sources, parameters[0], *(s[0] for s in parameter_strides), stats, flags, scores, peaks, block,
            vocab_size, KEEP_SCORES=keep_scores, num_warps=1, **common,
        )  # fmt: skip
        if filters:
            found, counts, totals = empty(rows, tiles * TILE.value), empty(rows, dtype=torch.int32), empty(rows)
            gather_kernel[(rows,)](
                parameters, *parameter_strides, stats, scores, peaks, found, counts, totals, block, vocab_size, tiles,
                BLOCK=tile_block, num_warps=16, enable_fp_fusion=False,
            )  # fmt: skip
            threshold_kernel[(rows,)](
                parameters, *parameter_strides, stats, found, counts, totals, lowest, block, vocab_size, tiles,
                BLOCK=tile_block, num_warps=16, enable_fp_fusion=False,
            )  # fmt: skip
            kept_kernel[(tiles, rows)](
                parameters[0], *(s[0] for s in parameter_strides), stats, scores, lowest, kept, block,
                num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
        draw_kernel[(rows,)](
            *sources, parameters, *parameter_strides, stats, flags, lowest, kept, *outputs[:2],
            *(outputs[2:] if logprobs else (stats, stats)), block, vocab_size, tiles,
            FILTERS=filters, BLOCK=tile_block, num_warps=4, **common,
        )  # fmt: skip
    if top_logprobs:
        top = scores[:, :vocab_size].topk(top_logprobs, dim=-1)
        chosen = scores.gather(-1, outputs[0].view(rows, 1))
        heat = parameters[0][(..., *[None] * (len(shape) - parameters[0].ndim))]
        coldness = torch.where(heat == 0, 1.0, 1 / heat.clamp_min(COLDEST.value)).expand(shape).reshape(rows, 1)
        outputs += [top.indices.view(*shape, top_logprobs)]
        outputs += [(outputs[2].view(rows, 1) + (top.values - chosen) * coldness).view(*shape, top_logprobs)]
    return GuidedSample(*outputs)
