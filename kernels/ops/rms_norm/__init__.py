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
    """x [..., width], weight [width] → [..., width]. offset 0 is Llama's order of rounding, offset 1 Gemma's (1 + w).

    In C++ on the CPU for float32 or bfloat16, in Triton on CUDA, ROCm and XPU for these and float16, of one dtype, that
    need no gradient. On the CPU a call is cheapest with contiguous tensors and a plain tensor as weight, since a
    Parameter is detached first. Otherwise, and where torch.compile traces it (to fuse it with its neighbours),
    `rms_norm_reference`. C++ sums in PyTorch's order, so results are its own bit for bit (from 8 wide; x86); a row's
    result does not depend on others.

    Raises:
        ValueError: a weight that is not as wide as x.
    """
    return _run(x, weight, eps, offset)
