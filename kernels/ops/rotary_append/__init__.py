"""rotary_append: from a layer's first product to queries and a filled cache (maths: reference.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _custom_op
from .._dispatch import dispatcher
from .._product import Lanes
from . import cpu, custom_op
from .reference import check, specification


def _on_gpu(*arguments: Any) -> Tensor | None:
    from . import triton  # the package triton takes half a second to import, and is not on every platform

    return triton.launch(*arguments)


_run = dispatcher(
    specification,
    check=check,
    cpu=cpu.run,
    convert=cpu.convert,
    triton=_on_gpu,
    custom_op=custom_op.call,
    differentiable=5,
)
_custom_op.implement(custom_op.call, _run)


def rotary_append(
    y: Tensor,  # [N, q, columns]: query heads, key heads, value heads; with lanes n · 3 · r shrunk inputs follow
    cos: Tensor,  # [N or 1, q, D]
    sin: Tensor,  # [N or 1, q, D]
    keys: Tensor,  # [S, Hkv, C, D], written in place
    values: Tensor,  # [S, Hkv, C, Dv], written in place
    slots: Tensor,  # int64 [N]
    positions: Tensor,  # int64 [N, q]
    *,
    query_norm: Tensor | None = None,  # [D], weights of an RMSNorm of each head
    key_norm: Tensor | None = None,  # [D]
    eps: float = 1e-6,
    bias: Tensor | None = None,  # [columns]
    lanes: Lanes | None = None,
) -> Tensor:
    """Write the keys and values of new tokens to the cache, and return their queries, rotated → [N, q, Hq, D].

    `ragged_attention` takes `result.transpose(1, 2)`. The number of query heads is read off the columns. In C++ on
    the CPU for float32 and bfloat16 without bias and lanes; in Triton on CUDA, ROCm and XPU for these and float16;
    where no gradient is needed. Otherwise in PyTorch. On a GPU slots and positions are not looked at, as by
    `ragged_append`. Rows must not share a slot. The lanes get no gradient.

    Raises:
        TypeError: dtypes or devices that differ; slots, positions or adapters that are not int64.
        ValueError: shapes that do not fit together; on the CPU, a slot, position or adapter that there is not.
    """
    return _run(y, cos, sin, keys, values, slots, positions, query_norm, key_norm, eps, bias, *(lanes or (None, None)))
