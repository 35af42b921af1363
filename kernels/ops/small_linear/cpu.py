"""small_linear in C++ on the CPU (kernels/csrc/small_linear), over weights whose addresses were handed over once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._tensors import in_memory
from .reference import Lora, Span


def readable(weight: Tensor, bias: Tensor | None, loras: Sequence[Lora]) -> tuple[Tensor, Tensor | None, list[Lora]]:
    """The weights as the core reads their memory: detached, contiguous, no negative bit; copied if needed."""

    def flat(tensor: Tensor) -> Tensor:
        return in_memory(tensor.detach()).contiguous()

    own = [Lora(flat(a), flat(b), float(scale)) for a, b, scale in loras]
    return flat(weight), None if bias is None else flat(bias), own


def prepare(linears: Sequence[Any]) -> Any:
    """The core's view of SmallLinears and QuantLinears of one width, which must outlive it.

    None where PyTorch has to serve: no core, an instruction set without these loops, tensors that it does not read.
    """
    described = [] if _native.core is None else [linear.described() for linear in linears]
    return None if not described or None in described else _native.core.linears(tuple(described))


def described(
    address: int, shape: Sequence[int], bias: Tensor | None, loras: Sequence[Lora], bits: int
) -> tuple[Any, ...] | None:
    """What the core takes of a linear, None where it does not read bias or LoRAs."""
    if not plain([*(t for a, b, _ in loras for t in (a, b)), *([] if bias is None else [bias])], torch.bfloat16):
        return None
    parts = tuple((a.data_ptr(), b.data_ptr(), a.shape[0], scale) for a, b, scale in loras)
    return address, 0 if bias is None else bias.data_ptr(), *shape, parts, bits


def plain(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether the tensors lie in the CPU's memory as this dtype; those of a subclass (quantised, fake) need not."""
    return all(
        type(tensor) is Tensor and tensor.is_cpu and tensor.dtype == dtype and (tensor.data_ptr() or not tensor.numel())
        for tensor in tensors
    )


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, loras: Sequence[Lora], spans: Sequence[Span], prepared: Any
) -> Tensor | None:
    """y of a bfloat16 x whose rows have one stride; None for another x, or for weights that are not prepared."""
    if prepared is None:
        return None
    y = prepared.run(x, spans)
    return None if y is None else y[0]


def run_once(
    x: Tensor, weight: Tensor, bias: Tensor | None, loras: Sequence[Lora], spans: Sequence[Span], _: None
) -> Tensor | None:
    """`run` for checked weights that are not prepared."""
    weight, bias, loras = readable(weight, bias, loras)
    found = described(weight.data_ptr(), weight.shape, bias, loras, 16) if plain([weight], torch.bfloat16) else None
    prepared = None if found is None or _native.core is None else _native.core.linears((found,))
    return run(x, weight, bias, loras, spans, prepared)


def convert(x: Tensor, *rest: Any) -> tuple[Any, ...] | None:
    """The arguments as `run` takes them."""
    return (_native.plain(x).contiguous(), *rest)


def run_siblings(
    x: Tensor, linears: Sequence[Any], spans: Sequence[Sequence[Span]], prepared: Any
) -> Sequence[Tensor] | None:
    """y of each linear, as `run` gives them one by one; None for what `run` does not take."""
    return None if prepared is None else prepared.run(x, *spans)
