"""silu_mul: the middle of a gated MLP (maths: reference.py)."""

from __future__ import annotations

from torch import Tensor

from .._dispatch import dispatcher
from . import cpu
from .reference import silu_mul_reference


def _on_gpu(gate: Tensor, up: Tensor) -> Tensor | None:
    from ..gated_mul import triton  # the package triton takes half a second to import, and is not on every platform

    return triton.launch_silu_mul(gate, up)


_run = dispatcher(silu_mul_reference, cpu=cpu.run, triton=_on_gpu, differentiable=2)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up of tensors of one shape, silu rounded to their dtype first.

    In C++ on the CPU for contiguous float32 or bfloat16 tensors that need no gradient, within 4e-6 of PyTorch's silu
    (1e-36 absolute where gate < -87); in Triton on CUDA, ROCm and XPU, for float16 and any strides too. Otherwise, and
    where torch.compile traces it (to fuse it with its neighbours), `silu_mul_reference`.
    """
    return _run(gate, up)
