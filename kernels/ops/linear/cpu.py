"""Linears in C++ on the CPU (kernels/csrc/linear). The core gets the addresses of the weights once."""

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
    """Return the tensors as the core can read them: detached, contiguous, without negative bit. Copies if needed."""

    def flat(tensor: Tensor) -> Tensor:
        return in_memory(tensor.detach()).contiguous()

    own = [Lora(flat(a), flat(b), float(scale)) for a, b, scale in loras]
    return flat(weight), None if bias is None else flat(bias), own


def prepare(linears: Sequence[Any]) -> Any:
    """Return the core's object for SmallLinears and QuantLinears of one width. The linears must outlive it.

    Return None if PyTorch has to multiply: without the core, on an instruction set without these loops, for tensors
    that the core can't read, and while a compiler traces.
    """
    found = [] if _native.core is None or is_compiling() else [linear.described() for linear in linears]
    return None if not found or None in found else _native.core.linears(tuple(found))


def described(weight: Tensor, linear: Any, bits: int) -> tuple[Any, ...] | None:
    """Return the tuple that describes a linear to the core; None if the core can't read its bias or LoRAs.

    weight: the memory of the linear's weights. bits: bits of one weight.
    """
    added = [*(t for a, b, _ in linear.loras for t in (a, b)), *([] if linear.bias is None else [linear.bias])]
    if not plain(added, linear.dtype):
        return None
    parts = tuple((a.data_ptr(), b.data_ptr(), a.shape[0], scale) for a, b, scale in linear.loras)
    bias = 0 if linear.bias is None else linear.bias.data_ptr()
    return weight.data_ptr(), bias, linear.out_features, linear.in_features, parts, bits


def plain(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether all tensors are of this dtype in the CPU's memory, and none is of a subclass (quantised, fake)."""
    return all(
        type(tensor) is Tensor and tensor.is_cpu and tensor.dtype == dtype and (tensor.data_ptr() or not tensor.numel())
        for tensor in tensors
    )


def run(x: Tensor, linear: Any, spans: Sequence[Span]) -> Tensor | None:
    """Return y [..., out]; None for a linear that is not prepared, or an x that the core does not take.

    The core takes an x of the linear's dtype whose rows have one stride.
    """
    if linear._core is None:
        return None
    y = linear._core.run(x, spans)
    return None if y is None else y[0]


def convert(x: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Return the arguments with an x that `run` takes: plain and contiguous."""
    return (_native.plain(x).contiguous(), *rest)


def run_siblings(
    x: Tensor, linears: Sequence[Any], spans: Sequence[Sequence[Span]], prepared: Any
) -> Sequence[Tensor] | None:
    """Return y of each linear with the bits of `run`; None for an x or linears that the core does not take."""
    return None if prepared is None else prepared.run(x, *spans)


def run_stacked(x: Tensor, linears: Sequence[Any], spans: Sequence[Sequence[Span]], prepared: Any) -> Tensor | None:
    """Return the outputs of `run_siblings` side by side in one tensor; None in the same cases."""
    return None if prepared is None else prepared.run_stacked(x, *spans)
