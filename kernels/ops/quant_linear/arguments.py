"""The checks of the arguments of quant_linear, of its weights once and of each call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..small_linear.arguments import check_spans
from ..small_linear.reference import Lora, Span


def check_call(
    x: Tensor, shape: tuple[int, int], device: torch.device, loras: Sequence[Lora], spans: Sequence[Span]
) -> None:
    """Raises ValueError or TypeError for an x that does not fit the weight, or spans out of range."""
    if x.shape[-1:] != shape[1:] or x.dtype != torch.bfloat16 or x.device != device:
        raise ValueError(
            f"x of shape {tuple(x.shape)}, {x.dtype} on {x.device}: expected [..., {shape[1]}], torch.bfloat16 on "
            f"{device}, as the weight"
        )
    check_spans(loras, spans, x.shape[:-1].numel())


def check_added(shape: tuple[int, int], device: torch.device, bias: Tensor | None, loras: Sequence[Lora]) -> None:
    """Raises ValueError for a bias or LoRAs that do not fit the weight."""
    out, width = shape
    named: list[tuple[str, Tensor, tuple[int, ...]]] = [] if bias is None else [("bias", bias, (out,))]
    for i, (a, b, _) in enumerate(loras):
        rank = a.shape[0] if a.ndim else 0
        named += [(f"loras[{i}].a", a, (rank, width)), (f"loras[{i}].b", b, (rank, out))]
    for name, tensor, expected in named:
        if tensor.shape != expected or tensor.dtype != torch.bfloat16 or tensor.device != device:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}: expected {expected}, "
                f"torch.bfloat16 on {device}"
            )
