"""settle on a GPU, in Triton: one program for each row; the maths are in reference.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tensors import dense, in_memory, launching_on
from .reference import Settled


@triton.jit
def settle_kernel(
    p_targets,
    s_targets,
    p_drafts,
    s_drafts,
    p_draft_counts,
    p_lengths,
    p_limits,
    p_finished,
    p_stop_ids,
    s_stop_ids,
    p_counts,
    p_next,
    p_new_lengths,
    p_new_finished,
    width,
    stops,
    RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    b_targets = tl.load(p_targets + row * s_targets + index, mask=index < width, other=-2)
    b_drafts = tl.load(p_drafts + row * s_drafts + index, mask=index < width - 1, other=-3)
    b_right = b_drafts == b_targets
    if RAGGED:
        b_right = b_right & (index < tl.load(p_draft_counts + row))
    wrong = tl.min(tl.where(b_right, BLOCK, index), axis=0)  # index of the first target without an equal draft
    b_stop = tl.zeros([BLOCK], tl.int1)
    for i in range(stops):
        b_stop = b_stop | (b_targets == tl.load(p_stop_ids + row * s_stop_ids + i))
    first_stop = tl.min(tl.where(b_stop & (index < width), index, width), axis=0)

    length, limit = tl.load(p_lengths + row), tl.load(p_limits + row)
    finished = tl.load(p_finished + row) != 0
    room = limit - length  # may wrap below 0 if int64 can't hold it; the row then has room for the whole block
    room = tl.where(limit <= length, 0, tl.where(room < 0, width, room))
    count = tl.minimum(tl.minimum(wrong, first_stop) + 1, room)
    count = tl.where(finished, 0, count)
    length += count
    last = tl.max(tl.where(index == tl.maximum(count - 1, 0), b_targets, -2), axis=0)
    tl.store(p_counts + row, count)
    tl.store(p_next + row, last)
    tl.store(p_new_lengths + row, length)
    tl.store(p_new_finished + row, finished | (count > first_stop) | (length >= limit))


def launch(
    targets: Tensor,
    drafts: Tensor,
    lengths: Tensor,
    limits: Tensor,
    finished: Tensor,
    stop_ids: Tensor,
    draft_counts: Tensor | None,
) -> Settled:
    """Launch the kernel for checked arguments."""
    rows, width = targets.shape
    targets, drafts, stop_ids = map(dense, (targets, drafts, stop_ids))
    columns = [in_memory(column).contiguous() for column in (lengths, limits, finished)]
    ragged = columns[0] if draft_counts is None else in_memory(draft_counts).contiguous()
    outputs = [torch.empty(rows, dtype=torch.int64, device=targets.device) for _ in range(3)]
    outputs.append(torch.empty(rows, dtype=torch.bool, device=targets.device))
    with launching_on(targets.device):
        settle_kernel[(rows,)](
            targets, targets.stride(0), drafts, drafts.stride(0), ragged, *columns,
            stop_ids, stop_ids.stride(0) if stop_ids.ndim == 2 else 0, *outputs, width, stop_ids.shape[-1],
            RAGGED=draft_counts is not None, BLOCK=triton.next_power_of_2(width), num_warps=1,
        )  # fmt: skip
    return Settled(*outputs)
