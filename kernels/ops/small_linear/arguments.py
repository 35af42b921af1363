"""The checks of the arguments of small_linear, of its weights once and of each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .reference import Lora, Span


def check_call(
    x: Tensor, weight: Tensor, bias: Tensor | None, loras: Sequence[Lora], spans: Sequence[Span], *_: Any
) -> None:
    """Raises ValueError or TypeError for an x that does not fit the weight, or spans out of range."""
    if x.shape[-1:] != weight.shape[1:] or x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(
            f"x of shape {tuple(x.shape)}, {x.dtype} on {x.device}: expected [..., {weight.shape[1]}], "
            f"{weight.dtype} on {weight.device}, as the weight"
        )
    check_spans(loras, spans, x.shape[:-1].numel())


def check_spans(loras: Sequence[Lora], spans: Sequence[Span], rows: int | None = None) -> None:
    """Raises for spans that are not three ints, or out of range; rows=None: their number is not known yet."""
    for span in spans:
        whole = isinstance(span, tuple) and all(isinstance(i, int) or hasattr(i, "__index__") for i in span)
        if not whole or len(span) != 3:
            raise TypeError(f"span {span!r}: expected (first row, last row, LoRA), three ints")
        first, last, index = span
        if not (0 <= index < len(loras) and (rows is None or 0 <= first <= last <= rows)):
            raise ValueError(f"span {span}: expected rows within 0..{rows}, one of {len(loras)} LoRAs")


def check_weights(weight: Tensor, bias: Tensor | None, loras: Sequence[Lora]) -> None:
    """Raises ValueError for tensors that do not fit the weight in shape, dtype or device."""
    if weight.ndim != 2 or not weight.dtype.is_floating_point:
        raise ValueError(f"weight of shape {tuple(weight.shape)}, {weight.dtype}: expected [out, in], floating point")
    out_features, in_features = weight.shape
    named: list[tuple[str, Tensor, tuple[int, ...]]] = [] if bias is None else [("bias", bias, (out_features,))]
    for i, (a, b, _) in enumerate(loras):
        rank = a.shape[0] if a.ndim else 0
        named += [(f"loras[{i}].a", a, (rank, in_features)), (f"loras[{i}].b", b, (rank, out_features))]
    for name, tensor, shape in named:
        if tensor.shape != shape or tensor.dtype != weight.dtype or tensor.device != weight.device:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}: "
                f"expected {shape}, {weight.dtype} on {weight.device}, as the weight"
            )
