"""Add a layer's output to the residual stream and normalise the sum, in one pass.

    h' = h + y        n = rms_norm(h')

y is the product of an output projection. Where there are LoRA lanes, their B completes it (`_product.py`).
"""

from __future__ import annotations

from torch import Tensor

from .._product import check_lanes, product
from ..rms_norm.reference import rms_norm_reference


def check(
    hidden: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float, b: Tensor | None, index: Tensor | None
) -> None:
    """Check the arguments of add_rms_norm. Raises TypeError or ValueError that names the argument."""
    width = hidden.shape[-1] if hidden.ndim else 0
    if weight.shape != (width,) or not width:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: expected ({width},), the width of hidden")
    if y.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(f"y of shape {tuple(y.shape)}: expected {(*hidden.shape[:-1], 'out')}, the rows of hidden")
    if y.dtype != hidden.dtype or not y.dtype.is_floating_point:
        raise TypeError(f"y of dtype {y.dtype}: expected {hidden.dtype}, floating point, as hidden")
    check_lanes(y, width, 1, b, index)


def specification(
    hidden: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float, b: Tensor | None, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The specification of `add_rms_norm`."""
    total = hidden + product(y, (hidden.shape[-1],), None, b, index)
    return total, rms_norm_reference(total, weight, eps, offset)
