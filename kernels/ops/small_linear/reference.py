"""A linear layer over bfloat16 or float32 weights. Few rows run at the speed at which weights arrive from memory.

    y = x Wᵀ + bias, and for the rows of each span      y += scale · (x Aᵀ) B

A decode step reads every weight once for a handful of rows. The C++ core (kernels/csrc/small_linear) fetches each
weight once for up to 16 rows, and multiplies bfloat16 pairs or float32 into float32 sums. It adds LoRA and bias to the
sums, and rounds once.

The order of each sum depends on nothing but `in`. So a row's result is bit for bit the same alone or among others, for
any number of threads, and on every instruction set. Without AVX2, or for other dtypes and devices, PyTorch multiplies
instead, without that guarantee. `in_order` has the order of float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..linear.lora import Lora, Span
from ..quant_linear.reference import fma

LANES, STEP = 16, 32  # partial sums of an output; inputs that the partial sums take in one step


def specification(
    x: Tensor, weight: Tensor, bias: Tensor | None, loras: Sequence[Lora], spans: Sequence[Span]
) -> Tensor:
    """Return x Wᵀ + bias, [..., out], with the LoRA of each span added to its rows. x: [..., in]. weight: [out, in]."""
    rows = x.shape[:-1].numel()
    y = functional.linear(x, weight, bias)
    flat_x, flat_y = x.reshape(rows, weight.shape[1]), y.view(rows, weight.shape[0])
    for first, last, index in spans:
        a, b, scale = loras[index]
        autocast = y.dtype != x.dtype
        if autocast or (x.is_cpu and x.dtype != torch.float32):  # on a CPU, small products are faster in float32
            flat_y[first:last] += (scale * (flat_x[first:last].float() @ a.float().T @ b.float())).to(y.dtype)
        else:
            flat_y[first:last].addmm_(flat_x[first:last] @ a.T, b, alpha=scale)
    return y


def dots(x: Tensor, weight: Tensor) -> Tensor:
    """Return x Wᵀ, [rows, out], summed in the order of the C++ core. x, weight: float32 [rows, in], [out, in].

    Lane l of 16 adds the products of inputs l, l + 16, l + 32, ... by fused multiply-adds, each rounded once. Zeros
    fill the inputs up to a multiple of 32. Then lanes 8 apart are added, and the sums 4, 2 and 1 apart in turn.
    """
    x, weight = (functional.pad(each, (0, -each.shape[1] % STEP)) for each in (x, weight))
    lanes = torch.zeros(len(x), len(weight), LANES, device=x.device)
    for first in range(0, x.shape[1], LANES):
        part = slice(first, first + LANES)
        lanes = fma(x[:, None, part], weight[None, :, part], lanes)
    for apart in (8, 4, 2, 1):
        lanes = lanes[..., :apart] + lanes[..., apart:]
    return lanes[..., 0]


def in_order(x: Tensor, weight: Tensor, bias: Tensor | None, loras: Sequence[Lora], spans: Sequence[Span]) -> Tensor:
    """Return `specification` of float32 tensors, with the bits of the C++ core.

    The LoRA of a span is added to its rows rank by rank. Each product and each sum is rounded. The bias is added last.
    """
    flat = x.reshape(x.shape[:-1].numel(), weight.shape[1])
    y = dots(flat, weight)
    for first, last, index in spans:
        a, b, scale = loras[index]
        hidden = scale * dots(flat[first:last], a)
        for rank, row in enumerate(b):
            y[first:last] += hidden[:, rank, None] * row
    return (y if bias is None else y + bias).view(*x.shape[:-1], weight.shape[0])
