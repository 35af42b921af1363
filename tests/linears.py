"""Linears for each number of bits that a weight can have, for tests of their common properties."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genarm_fast.kernels import Lora, QuantLinear, QuantWeight, SmallLinear

KINDS = (32, 16, 8, 4)  # bits per weight


def dtype_of(bits: int) -> torch.dtype:
    """Return the dtype of a linear's inputs and outputs."""
    return torch.float32 if bits == 32 else torch.bfloat16


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return normally distributed numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return rows with a few large values, as the first tokens of a text have."""
    x = normal(*shape, seed=seed, dtype=torch.float32)
    return (x * normal(*shape, seed=seed + 1, dtype=torch.float32).mul(2).exp()).to(dtype)


def random_weight(out: int, width: int, bits: int, seed: int = 0) -> QuantWeight:
    """Return a quantized weight [out, width] with codes from the full range and scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-width // 32)
    scales = (torch.randn(out, groups, generator=generator) * 0.01).half()
    if bits == 8:
        codes = torch.randint(-128, 128, (out, width), generator=generator).to(torch.int8)
        return QuantWeight(codes, scales)
    codes = torch.randint(0, 16, (out, width), generator=generator).to(torch.uint8)
    return QuantWeight(codes, scales, (torch.randn(out, groups, generator=generator) * 0.1).half())


def made(
    bits: int, out: int, width: int, bias: Tensor | None = None, loras: Sequence[Lora] = (), seed: int = 1
) -> SmallLinear | QuantLinear:
    """Return a prepared linear [out, width] with random weights of this many bits."""
    if bits >= 16:
        return SmallLinear(normal(out, width, seed=seed, dtype=dtype_of(bits)), bias, loras)
    return QuantLinear(random_weight(out, width, bits, seed), bias, loras)


def ranks(out: int, width: int, *each: int, dtype: torch.dtype = torch.bfloat16) -> list[Lora]:
    """Return a LoRA for a linear [out, width] of each of these ranks."""
    return [
        Lora(normal(rank, width, seed=rank, dtype=dtype), normal(rank, out, seed=rank + 50, dtype=dtype), 0.7)
        for rank in each
    ]
