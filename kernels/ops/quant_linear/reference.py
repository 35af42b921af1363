"""Linear layer over weights of 8 or 4 bits, with sums of whole numbers that no order changes.

    y = bfloat16(x Wᵀ + bias), and for the rows of each span      + scale · (x Aᵀ) B

W has a float16 scale for each 32 inputs of an output, and of 4 bits a minimum. Each 32 inputs of a row become whole
numbers of 16 bits times a power of two, which loses nothing of a bfloat16 unless the largest of the 32 is 2^7 times as
large. For each group in turn the whole numbers are multiplied and added exactly, rounded to float32, and added to the
sum by one fused multiply-add; then, of 4 bits, the minimum times the sum of the inputs by another. LoRA and bias are
added in float32, and the result is rounded once.

So every row has one result, bit for bit: alone or among others, for any number of threads, on every instruction set,
and in this file. (A LoRA's own sums have small_linear's order in the core, and PyTorch's here.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linear.lora import Lora, Span
from .weights import QuantWeight, in_groups

BITS = 14  # the largest of a group is in [2^14, 2^15)
SMALLEST, LARGEST = 127 - 60, 127 + 96  # exponents, as float32 has them


def quantize_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 [rows, in] → whole numbers, float32 [rows, groups, 32], and scales, float32 [rows, groups].

    A group below 2^-60 counts as zeros. One that holds NaN, an infinity, or 2^97 and more has the scale NaN, and so do
    all results of its row.
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
    """a · b + c in float32, rounded once. a, b and c broadcast, and the product has to fit into 53 bits, as here."""
    product, addend = torch.broadcast_tensors(a.double() * b.double(), c.double())
    near = product + addend
    seen = near - product
    error = (product - (near - seen)) + (addend - seen)
    # Rounded to odd instead of to even, a float64 rounds to the float32 that the sum itself does.
    bits = near.view(torch.int64)
    inexact = (error != 0) & error.isfinite() & (bits & 1 == 0)
    away = torch.where((error > 0) == (near > 0), 1, -1)
    return torch.where(inexact, bits + away, bits).view(torch.float64).float()


def specification(
    x: Tensor, weight: QuantWeight, bias: Tensor | None, loras: Sequence[Lora], spans: Sequence[Span]
) -> Tensor:
    """x [..., in] bfloat16, weight [out, in] → [..., out] bfloat16, with the LoRA of each span on its rows."""
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
