"""The product of a linear layer with LoRA lanes, as the op that reads it next completes it.

    y = x [W | A₀ | A₁ | ...]ᵀ        y[:, :out] + Σ_k y[:, out + (a · P + p) · r + k] B_a[k]  for rows of adapter a

Each adapter's A rides as extra rows of the stacked weight, so that shrinking x costs no launch and one read of x. P
linears of one input may be stacked (query, key, value), each with its own A; columns of part p take that part's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Lanes(NamedTuple):
    """LoRAs of a stacked product, and which rows take which: rows are lane after lane, of one size.

    Lower ranks are padded with rows of zeros, as are linears that an adapter leaves alone.
    """

    b: Tensor  # [n, r, out], the B of n adapters: transposed, with their scales in them, of the product's dtype
    adapters: Tensor  # int64 [lanes]: the adapter of each lane, or -1


def shrunk(b: Tensor | None, parts: int) -> int:
    """How many columns the shrunk inputs of all adapters take."""
    return 0 if b is None else b.shape[0] * parts * b.shape[1]


def check_lanes(y: Tensor, out: int, parts: int, b: Tensor | None, index: Tensor | None) -> None:
    """Raises TypeError or ValueError for a product y [..., width] that does not have `out` columns and those of A."""
    extra = shrunk(b, parts)
    if y.ndim < 1 or y.shape[-1] != out + extra:
        raise ValueError(f"y of shape {tuple(y.shape)}: expected [..., {out} + {extra}], outputs and shrunk inputs")
    if b is None or index is None:
        return
    rows = y.shape[:-1].numel()
    if b.ndim != 3 or b.shape[2] != out:
        raise ValueError(f"lanes.b of shape {tuple(b.shape)}: expected [n, r, {out}]")
    if b.dtype != y.dtype or b.device != y.device:
        raise ValueError(f"lanes.b of {b.dtype} on {b.device}: expected {y.dtype} on {y.device}, as y")
    if index.dtype != torch.int64 or index.device != y.device:
        raise TypeError(f"lanes.adapters of {index.dtype} on {index.device}: expected int64 on {y.device}, where y is")
    if index.ndim != 1 or not len(index) or rows % len(index):
        raise ValueError(f"lanes.adapters of shape {tuple(index.shape)}: expected [lanes], a divisor of {rows} rows")
    if index.is_cpu and bool(((index < -1) | (index >= len(b))).any()):  # elsewhere it would wait for the device
        raise ValueError(f"lanes.adapters from {index.min()} to {index.max()}: expected -1..{len(b) - 1}")


def product(y: Tensor, widths: Sequence[int], bias: Tensor | None, b: Tensor | None, index: Tensor | None) -> Tensor:
    """The specification: y's first columns with bias and LoRA, added in float32, rounded once → [..., sum(widths)]."""
    out = sum(widths)
    plain = y[..., :out]
    if bias is None and b is None:
        return plain
    precise = torch.promote_types(y.dtype, torch.float32)
    total = plain.to(precise)
    if bias is not None:
        total = total + bias.to(precise)
    if b is not None and index is not None:
        rows = y.shape[:-1].numel()
        adapter = index.repeat_interleave(rows // len(index)).view(*y.shape[:-1], 1)
        inputs = y[..., out:].to(precise).unflatten(-1, (len(b), len(widths), b.shape[1]))
        for i, matrix in enumerate(b.to(precise)):
            parts = zip(inputs[..., i, :, :].unbind(-2), matrix.split(list(widths), -1))
            added = torch.cat([x @ part for x, part in parts], -1)
            total = torch.where(adapter == i, total + added, total)
    return total.to(y.dtype)
