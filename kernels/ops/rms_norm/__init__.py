"""rms_norm: root-mean-square normalisation (maths: reference.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._dispatch import dispatcher
from . import cpu
from .reference import rms_norm_reference


def _check(x: Tensor, weight: Tensor, eps: float, offset: float) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: expected {tuple(x.shape[-1:])}, the width of x")


def _on_gpu(*arguments: Any) -> Tensor | None:
    from . import triton  # the package triton takes half a second to import, and is not on every platform

    return triton.launch(*arguments)


_run = dispatcher(rms_norm_reference, check=_check, cpu=cpu.run, convert=cpu.convert, triton=_on_gpu, differentiable=2)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """Return x / sqrt(mean(x²) + eps), scaled by the weight: [..., width] for x [..., width] and weight [width].

    offset 0 rounds to the dtype of x before it multiplies by the weight, as Llama does. Another offset multiplies by
    offset + weight before it rounds; offset 1 is Gemma's.

    Tensors of one dtype that need no gradient run in C++ on the CPU, in float32 and bfloat16. On CUDA, ROCm and XPU
    they run in Triton, in float16 too. `rms_norm_reference` serves other calls, and calls that torch.compile traces, so
    that the compiler can fuse it with its neighbours. On the CPU a call is cheapest with contiguous tensors and a plain
    tensor as weight, because a Parameter is detached first. C++ sums in PyTorch's order, so its results are PyTorch's
    bit for bit (x86, from a width of 8). A row's result does not depend on other rows.

    Raises:
        ValueError: a weight that is not as wide as x.
    """
    return _run(x, weight, eps, offset)
