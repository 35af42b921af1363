"""Linear layer of few rows over bfloat16 weights, at the speed at which the weights arrive from memory.

    y = x Wᵀ + bias, and for the rows of each span      y += scale · (x Aᵀ) B

A decode step reads every weight once for a handful of rows. The C++ core (kernels/csrc/small_linear) fetches each
weight once for up to 16 rows, multiplies bfloat16 pairs into float32 sums, adds bias and LoRA to those, and rounds
once.

The order of each sum depends on nothing but `in`: a row's result is bit for bit the same alone or among others, for any
number of threads, and on every instruction set. Where the core does not serve (no AVX2, other dtypes, other devices)
PyTorch does, without that guarantee.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..linear.lora import Lora, Span


def specification(
    x: Tensor, weight: Tensor, bias: Tensor | None, loras: Sequence[Lora], spans: Sequence[Span]
) -> Tensor:
    """x [..., in], weight [out, in] → [..., out], with the LoRA of each span on its rows."""
    rows = x.shape[:-1].numel()
    y = functional.linear(x, weight, bias)
    flat_x, flat_y = x.reshape(rows, weight.shape[1]), y.view(rows, weight.shape[0])
    for first, last, index in spans:
        a, b, scale = loras[index]
        autocast = y.dtype != x.dtype
        if autocast or (x.is_cpu and x.dtype != torch.float32):  # small products are faster in float32 there
            flat_y[first:last] += (scale * (flat_x[first:last].float() @ a.float().T @ b.float())).to(y.dtype)
        else:
            flat_y[first:last].addmm_(flat_x[first:last] @ a.T, b, alpha=scale)
    return y
