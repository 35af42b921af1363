"""gated_mul: the middle of a gated MLP over one product (maths: reference.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _custom_op
from .._dispatch import dispatcher
from .._product import Lanes
from . import custom_op
from .reference import check, specification


def _on_gpu(*arguments: Any) -> Tensor | None:
    from . import triton  # the package triton takes half a second to import, and is not on every platform

    return triton.launch(*arguments)


_run = dispatcher(specification, check=check, triton=_on_gpu, custom_op=custom_op.call, differentiable=1)
_custom_op.implement(custom_op.call, _run)


def gated_mul(
    y: Tensor,  # [..., 2 · width], gate before up; with lanes 2 · n · r columns of shrunk inputs of n adapters follow
    *,
    activation: str = "silu",
    lanes: Lanes | None = None,
) -> Tensor:
    """Return act(gate) · up, [..., width], from one stacked product y of gate and up.

    `silu_mul` does the same for two tensors. Here LoRA lanes may complete y first. The lanes get no gradient.

    Runs in Triton on CUDA, ROCm and XPU for float32, bfloat16 and float16 that need no gradient. Other calls run in
    PyTorch.

    Args:
        activation: silu, gelu, or gelu_tanh.
        lanes: LoRA adapters of gate and up.

    Raises:
        TypeError: y that is not floating point; adapters that are not int64.
        ValueError: shapes that do not fit together, an unknown activation; on the CPU, an adapter that the lanes do not
            have.
    """
    return _run(y, activation, *(lanes or (None, None)))
