"""Complete the product of a linear layer with LoRA lanes. The op that reads the product next does so.

    y = x [W | A₀ | A₁ | ...]ᵀ        y[:, :out] + Σ_k y[:, out + (a · P + p) · r + k] B_a[k]  for rows of adapter a

The A of each adapter is stored below W as r more rows of the stacked weight. So x Aᵀ, the shrunk inputs, needs no
launch of its own, and x is read once. P linears that share an input (query, key and value) may be stacked, each with
its own A. The output columns of linear p are completed by the shrunk inputs of linear p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Lanes(NamedTuple):
    """LoRA adapters of a stacked product, and the adapter of each lane.

    The rows of a product belong to the lanes in order, to each lane the same number of rows. Adapters of a lower rank
    are padded to r with rows of zeros. A linear that an adapter does not change has zeros for it.
    """

    b: Tensor  # [n, r, out], B of n adapters, transposed and multiplied by the adapter's scale; the product's dtype
    adapters: Tensor  # int64 [lanes]: the adapter of each lane; -1 for none


def shrunk(b: Tensor | None, parts: int) -> int:
    """Return the number of columns that hold the shrunk inputs of all adapters, for `parts` stacked linears."""
    return 0 if b is None else b.shape[0] * parts * b.shape[1]


def check_lanes(y: Tensor, out: int, parts: int, b: Tensor | None, index: Tensor | None) -> None:
    """Check a product y [..., out + shrunk inputs] of `parts` stacked linears, and its lanes.

    Raises TypeError or ValueError that names the argument.
    """
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
    if index.is_cpu and bool(((index < -1) | (index >= len(b))).any()):  # on a GPU the check would wait for the device
        raise ValueError(f"lanes.adapters from {index.min()} to {index.max()}: expected -1..{len(b) - 1}")


def product(y: Tensor, widths: Sequence[int], bias: Tensor | None, b: Tensor | None, index: Tensor | None) -> Tensor:
    """Return the completed product [..., sum(widths)]: the specification of what the kernels compute.

    The first sum(widths) columns of y get bias and LoRA. Sums are in float32 (float64 for float64), and rounded once.

    widths: the output columns of each stacked linear.
    bias: [sum(widths)]; b and index: the fields of `Lanes`.
    """
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
