"""add_rms_norm: add to the residual stream and normalise it (maths: reference.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _custom_op
from .._dispatch import dispatcher
from .._product import Lanes
from . import cpu, custom_op
from .reference import check, specification


def _on_gpu(hidden: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor] | None:
    from ..rms_norm import triton  # the package triton takes half a second to import, and is not on every platform

    return triton.run(hidden, y, *rest)


_run = dispatcher(
    specification,
    check=check,
    cpu=cpu.run,
    convert=cpu.convert,
    triton=_on_gpu,
    custom_op=custom_op.call,
    differentiable=3,
)
_custom_op.implement(custom_op.call, _run)


def add_rms_norm(
    hidden: Tensor,  # [..., width]
    y: Tensor,  # [..., width]; with lanes [..., width + n · r], where the shrunk inputs of n adapters follow
    weight: Tensor,  # [width]
    eps: float,
    *,
    offset: float = 0.0,
    lanes: Lanes | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (hidden + y, rms_norm(hidden + y)), both [..., width].

    The sum is the residual stream after half a layer, and its norm is the input of the next half. The sum is rounded
    before it is normalised. `offset` is the one of `rms_norm`. `lanes` are LoRA adapters that complete y.

    Tensors of one dtype that need no gradient run in C++ on the CPU, if they are contiguous float32 or bfloat16 and
    there are no lanes. On CUDA, ROCm and XPU they run in Triton, in float16 too. Other calls run in PyTorch. The lanes
    get no gradient.

    Raises:
        TypeError: dtypes that differ; adapters that are not int64.
        ValueError: shapes that do not fit together; on the CPU, an adapter that the lanes do not have.
    """
    return _run(hidden, y, weight, eps, offset, *(lanes or (None, None)))
