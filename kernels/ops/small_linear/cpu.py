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


def prepare(linears: Sequence[tuple[Tensor, Tensor | None, Sequence[Lora]]]) -> Any:
    """The core's view of linears (weight, bias, loras) of one width, which must outlive it.

    None where PyTorch has to serve: no core, an instruction set without these loops, tensors that it does not read.
    """
    if _native.core is None or not all(_streams(weight, bias, loras) for weight, bias, loras in linears):
        return None
    return _native.core.linears(
        tuple(
            (
                weight.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                *weight.shape,
                tuple((a.data_ptr(), b.data_ptr(), a.shape[0], scale) for a, b, scale in loras),
            )
            for weight, bias, loras in linears
        )
    )


def _streams(weight: Tensor, bias: Tensor | None, loras: Sequence[Lora]) -> bool:
    """Whether the tensors lie in the CPU's memory as bfloat16; those of a subclass (quantised, fake) need not."""
    tensors = [weight, *(t for a, b, _ in loras for t in (a, b)), *([] if bias is None else [bias])]
    plain = weight.is_cpu and weight.dtype == torch.bfloat16 and {*map(type, tensors)} == {Tensor}
    return plain and all(tensor.data_ptr() or not tensor.numel() for tensor in tensors)


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
    weights = readable(weight, bias, loras)
    return run(x, *weights, spans, prepare([weights]))


def convert(x: Tensor, *rest: Any) -> tuple[Any, ...] | None:
    """The arguments as `run` takes them."""
    return (_native.plain(x).contiguous(), *rest)


def run_siblings(
    x: Tensor, linears: Sequence[Any], spans: Sequence[Sequence[Span]], prepared: Any
) -> Sequence[Tensor] | None:
    """y of each linear, as `run` gives them one by one; None for what `run` does not take."""
    return None if prepared is None else prepared.run(x, *spans)
