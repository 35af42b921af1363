"""Linear layer over weights of 8 or 4 bits, with exact sums of whole numbers, which do not depend on their order.

    y = bfloat16(x Wᵀ + bias), and for the rows of each span      + scale · (x Aᵀ) B

W has a float16 scale for each group of 32 inputs of an output, and with 4 bits also a minimum. Each group of 32 inputs
of x becomes whole numbers of 16 bits times a power of two. A bfloat16 loses nothing by this, unless the largest of its
group is more than 2^7 times as large. The groups are taken in order. A group's whole numbers are multiplied and added
exactly, rounded to float32, and added to the total by one fused multiply-add. With 4 bits, another one adds the minimum
times the sum of the inputs. LoRA and bias are added in float32, and the result is rounded once.

So a row has the same result bit for bit: alone or among other rows, for any number of threads, on every instruction
set, and in this file. Only a LoRA's sums differ: the core adds in small_linear's order, and this file in PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linear.lora import Lora, Span
from .weights import QuantWeight, in_groups

BITS = 14  # the largest whole number of a group is in [2^14, 2^15)
SMALLEST, LARGEST = 127 - 60, 127 + 96  # biased exponents of float32, for 2^-60 and 2^96


def quantize_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers, float32 [rows, groups, 32], and scales, float32 [rows, groups], for x bfloat16 [rows, in].

    Groups are scaled as if their largest value were at least 2^-60, so those far below it count as zeros. A group with
    NaN, an infinity, or a value of 2^97 or more has the scale NaN, and so all results of its row are NaN.
    """
    grouped = in_groups(x, x.shape[1])
    exponent = ((grouped.view(torch.int16) & 0x7FFF) >> 7).amax(-1).to(torch.int32)
    lost = exponent > LARGEST
    exponent = exponent.clamp(SMALLEST, LARGEST)
    up = ((2 * 127 + BITS - exponent) << 23).view(torch.float32)
    scales = ((exponent - BITS) << 23).view(torch.float32)
    codes = (grouped.float() * up[..., None]).round()
    return codes.masked_fill(lost[..., None], 0.0), scales.masked_fill(lost, torch.nan)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a · b + c in float32, rounded once. The arguments broadcast. The product has to fit into 53 bits."""
    product, addend = torch.broadcast_tensors(a.double() * b.double(), c.double())
    near = product + addend
    seen = near - product
    error = (product - (near - seen)) + (addend - seen)
    # A float64 that is rounded to odd instead of to even rounds to the same float32 as the exact sum.
    bits = near.view(torch.int64)
    inexact = (error != 0) & error.isfinite() & (bits & 1 == 0)
    away = torch.where((error > 0) == (near > 0), 1, -1)
    return torch.where(inexact, bits + away, bits).view(torch.float64).float()


def specification(
    x: Tensor, weight: QuantWeight, bias: Tensor | None, loras: Sequence[Lora], spans: Sequence[Span]
) -> Tensor:
    """Return y, bfloat16 [..., out], for x bfloat16 [..., in] and weight [out, in]. A span's rows get its LoRA."""
    codes, scales, minimums = weight
    out, width = codes.shape
    flat = x.reshape(x.shape[:-1].numel(), width)
    inputs, input_scales = quantize_inputs(flat)
    grouped = in_groups(codes, width)
    total = torch.zeros(len(flat), out, device=x.device)
    for group in range(grouped.shape[1]):
        whole = inputs[:, group].double() @ grouped[:, group].double().T  # below 2^53: exact
        total = fma(whole.float(), scales[:, group].float() * input_scales[:, group, None], total)
        if minimums is not None:
            summed = inputs[:, group].sum(-1) * input_scales[:, group]
            total = fma(summed[:, None], minimums[:, group].float(), total)
    for first, last, index in spans:
        a, b, scale = loras[index]
        total[first:last] += scale * (flat[first:last].float() @ a.float().T) @ b.float()
    if bias is not None:
        total = total + bias.float()
    return total.to(torch.bfloat16).view(*x.shape[:-1], out)
