"""The checks of settle's arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def check(
    targets: Tensor,
    drafts: Tensor,
    lengths: Tensor,
    limits: Tensor,
    finished: Tensor,
    stop_ids: Tensor,
    draft_counts: Tensor | None = None,
) -> None:
    """Check the arguments of settle. Raises TypeError or ValueError that names the argument."""
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
