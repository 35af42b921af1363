"""Linears in C++ on the CPU (kernels/csrc/linear), over weights whose addresses were handed over once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _native
from .._tensors import in_memory
from .lora import Lora, Span


def readable(weight: Tensor, bias: Tensor | None, loras: Sequence[Lora]) -> tuple[Tensor, Tensor | None, list[Lora]]:
    """The weights as the core reads their memory: detached, contiguous, no negative bit; copied if needed."""

    def flat(tensor: Tensor) -> Tensor:
        return in_memory(tensor.detach()).contiguous()

    own = [Lora(flat(a), flat(b), float(scale)) for a, b, scale in loras]
    return flat(weight), None if bias is None else flat(bias), own


def prepare(linears: Sequence[Any]) -> Any:
    """The core's view of SmallLinears and QuantLinears of one width, which must outlive it.

    None where PyTorch has to serve: no core, an instruction set without these loops, tensors that it does not read, and
    while a compiler traces.
    """
    found = [] if _native.core is None or is_compiling() else [linear.described() for linear in linears]
    return None if not found or None in found else _native.core.linears(tuple(found))


def described(weight: Tensor, linear: Any, bits: int) -> tuple[Any, ...] | None:
    """What the core takes of a linear over this memory, None where it does not read bias or LoRAs."""
    added = [*(t for a, b, _ in linear.loras for t in (a, b)), *([] if linear.bias is None else [linear.bias])]
    if not plain(added, linear.dtype):
        return None
    parts = tuple((a.data_ptr(), b.data_ptr(), a.shape[0], scale) for a, b, scale in linear.loras)
    bias = 0 if linear.bias is None else linear.bias.data_ptr()
    return weight.data_ptr(), bias, linear.out_features, linear.in_features, parts, bits


def plain(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether the tensors lie in the CPU's memory as this dtype; those of a subclass (quantised, fake) need not."""
    return all(
        type(tensor) is Tensor and tensor.is_cpu and tensor.dtype == dtype and (tensor.data_ptr() or not tensor.numel())
        for tensor in tensors
    )


def run(x: Tensor, linear: Any, spans: Sequence[Span]) -> Tensor | None:
    """y of a bfloat16 x whose rows have one stride; None for another x, or for a linear that is not prepared."""
    if linear._core is None:
        return None
    y = linear._core.run(x, spans)
    return None if y is None else y[0]


def convert(x: Tensor, *rest: Any) -> tuple[Any, ...]:
    """The arguments as `run` takes them."""
    return (_native.plain(x).contiguous(), *rest)


def run_siblings(
    x: Tensor, linears: Sequence[Any], spans: Sequence[Sequence[Span]], prepared: Any
) -> Sequence[Tensor] | None:
    """y of each linear, as `run` gives them one by one; None for what `run` does not take."""
    return None if prepared is None else prepared.run(x, *spans)


def run_stacked(x: Tensor, linears: Sequence[Any], spans: Sequence[Sequence[Span]], prepared: Any) -> Tensor | None:
    """What `run_siblings` gives, side by side in one tensor."""
    return None if prepared is None else prepared.run_stacked(x, *spans)
