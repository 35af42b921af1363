"""Settle a block of drafted tokens on the device: how many are right, and where stop tokens and limits cut them.

Row r drafted d_1 .. d_k, k ≤ K, and guided_sample drew the targets y_1 .. y_{k+1} with the drafter's own noise. What is
settled is always the target's tokens, so drafting never changes the text:

    n = 1 + |longest prefix with d_i = y_i|        then at most up to the first stop token, and to the row's limit
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _native, custom_ops


class Settled(NamedTuple):
    """Result of `settle`. The settled tokens of row r are targets[r, :counts[r]].

    counts: int64 [R], 0 for rows that were finished before.
    next_tokens: int64 [R], the last settled token, which is the next round's input; any valid id for finished rows.
    lengths: int64 [R], tokens of the response including those now settled.
    finished: bool [R], by a stop token, the limit, or before.
    """

    counts: Tensor
    next_tokens: Tensor
    lengths: Tensor
    finished: Tensor


def settle_reference(
    targets: Tensor,
    drafts: Tensor,
    *,
    lengths: Tensor,
    limits: Tensor,
    finished: Tensor,
    stop_ids: Tensor,
    draft_counts: Tensor | None = None,
) -> Settled:
    """The specification of `settle` in plain PyTorch."""
    check(targets, drafts, lengths, limits, finished, stop_ids, draft_counts)
    width = targets.shape[1]
    index = torch.arange(width, device=targets.device)
    right = drafts == targets[:, :-1]
    if draft_counts is not None:
        right &= index[:-1] < draft_counts[:, None]
    counts = 1 + right.to(torch.int64).cumprod(-1).sum(-1)
    stops = (targets[:, :, None] == stop_ids.unsqueeze(-2)).any(-1)
    first_stop = torch.where(stops, index, width).amin(-1)
    counts = torch.minimum(torch.minimum(counts, first_stop + 1), (limits - lengths).clamp_min(0))
    counts = counts.masked_fill(finished, 0)
    lengths = lengths + counts
    next_tokens = targets.gather(-1, (counts - 1).clamp_min(0)[:, None]).squeeze(-1)
    return Settled(counts, next_tokens, lengths, finished | (counts > first_stop) | (lengths >= limits))


def check(
    targets: Tensor,
    drafts: Tensor,
    lengths: Tensor,
    limits: Tensor,
    finished: Tensor,
    stop_ids: Tensor,
    draft_counts: Tensor | None,
) -> None:
    rows, width = targets.shape if targets.ndim == 2 else (0, 0)
    if width == 0:
        raise ValueError(f"targets of shape {tuple(targets.shape)}: expected [R, K + 1]")
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {"drafts": (drafts, (rows, width - 1))}
    expected |= {"lengths": (lengths, (rows,)), "limits": (limits, (rows,)), "finished": (finished, (rows,))}
    if draft_counts is not None:
        expected["draft_counts"] = (draft_counts, (rows,))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: expected {shape}, by targets")
    tensors = {"targets": targets, "stop_ids": stop_ids} | {name: tensor for name, (tensor, _) in expected.items()}
    for name, tensor in tensors.items():
        if tensor.device != targets.device:
            raise ValueError(f"{name} on {tensor.device}: expected {targets.device}, where targets are")
        dtypes = (torch.bool,) if name == "finished" else (torch.int64, torch.int32)
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} of dtype {tensor.dtype}: expected {dtypes[0]}")
    if stop_ids.shape[:-1] not in ((), (rows,)) or not stop_ids.ndim:
        raise ValueError(f"stop_ids of shape {tuple(stop_ids.shape)}: expected [S] or [{rows}, S]")


def settle(
    targets: Tensor,  # int64 [R, K + 1], from guided_sample
    drafts: Tensor,  # int64 [R, K]
    *,
    lengths: Tensor,  # int64 [R], tokens of the response so far
    limits: Tensor,  # int64 [R], most tokens of the response
    finished: Tensor,  # bool [R]
    stop_ids: Tensor,  # int64 [S] or [R, S], padded with -1
    draft_counts: Tensor | None = None,  # int64 [R], drafts of each row; K for all by default
) -> Settled:
    """Settle the drafts that equal their targets, and the first target that no draft foretold.

    Reads nothing back: one Triton launch on CUDA, ROCm and XPU; C++ on the CPU, or `settle_reference` without it.

    Raises:
        TypeError: ids or lengths that are not integers, or `finished` that is not bool.
        ValueError: shapes that do not fit together, or tensors on other devices than `targets`.
    """
    if torch.compiler.is_compiling():
        check(targets, drafts, lengths, limits, finished, stop_ids, draft_counts)
        return Settled(*custom_ops.settle(targets, drafts, lengths, limits, finished, stop_ids, draft_counts))
    if _native.core is not None:
        fields = _native.core.settle(targets, drafts, lengths, limits, finished, stop_ids, draft_counts)
        if fields is not None:
            return Settled._make(fields)
    rest = {"lengths": lengths, "limits": limits, "finished": finished, "stop_ids": stop_ids}
    if targets.device.type in ("cuda", "xpu"):
        from . import settle_triton  # triton takes half a second to import, and is not on every platform

        check(targets, drafts, lengths, limits, finished, stop_ids, draft_counts)
        return Settled(*settle_triton.settle(targets, drafts, draft_counts=draft_counts, **rest))
    return settle_reference(targets, drafts, draft_counts=draft_counts, **rest)
