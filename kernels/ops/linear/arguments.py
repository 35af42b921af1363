"""Checks of a linear's arguments: its bias and LoRAs when it is made, x and spans at each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .lora import Lora, Span

NO_GRADIENT = "x requires grad: a linear of few rows has no gradient, call it in torch.inference_mode()"


def check_input(
    x: Tensor, width: int, dtype: torch.dtype, device: torch.device, loras: Sequence[Lora], spans: Sequence[Span]
) -> None:
    """Raise ValueError for an x that does not fit the weight, and the errors of `check_spans`."""
    if x.shape[-1:] != (width,) or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"x of shape {tuple(x.shape)}, {x.dtype} on {x.device}: expected [..., {width}], {dtype} on {device}, "
            "as the weight"
        )
    check_spans(loras, spans, x.shape[:-1].numel())


def check_call(x: Tensor, linear: Any, spans: Sequence[Span]) -> None:
    """Check the arguments of a call of a SmallLinear or a QuantLinear with `check_input`."""
    check_input(x, linear.in_features, linear.dtype, linear.device, linear.loras, spans)


def check_spans(loras: Sequence[Lora], spans: Sequence[Span], rows: int | None = None) -> None:
    """Raise TypeError for spans that are not three ints each, and ValueError for spans out of range.

    rows: the number of rows; None while it is not known, which leaves the rows of spans unchecked.
    """
    for span in spans:
        whole = isinstance(span, tuple) and all(isinstance(i, int) or hasattr(i, "__index__") for i in span)
        if not whole or len(span) != 3:
            raise TypeError(f"span {span!r}: expected (first row, last row, LoRA), three ints")
        first, last, index = span
        if not (0 <= index < len(loras) and (rows is None or 0 <= first <= last <= rows)):
            raise ValueError(f"span {span}: expected rows within 0..{rows}, one of {len(loras)} LoRAs")


def check_added(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, bias: Tensor | None, loras: Sequence[Lora]
) -> None:
    """Raise ValueError for a bias or LoRAs that do not fit a weight [out, in] in shape, dtype or device."""
    out, width = shape
    named: list[tuple[str, Tensor, tuple[int, ...]]] = [] if bias is None else [("bias", bias, (out,))]
    for i, (a, b, _) in enumerate(loras):
        rank = a.shape[0] if a.ndim else 0
        named += [(f"loras[{i}].a", a, (rank, width)), (f"loras[{i}].b", b, (rank, out))]
    for name, tensor, expected in named:
        if tensor.shape != expected or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}: "
                f"expected {expected}, {dtype} on {device}, as the weight"
            )
