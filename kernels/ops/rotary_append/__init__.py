"""rotary_append: turn a layer's first product into rotated queries and entries of the cache (maths: reference.py)."""

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
    y: Tensor,  # [N, q, columns]: query heads, key heads, value heads; with lanes, n · 3 · r shrunk inputs follow
    cos: Tensor,  # [N or 1, q, D]
    sin: Tensor,  # [N or 1, q, D]
    keys: Tensor,  # [S, Hkv, C, D], written in place
    values: Tensor,  # [S, Hkv, C, Dv], written in place
    slots: Tensor,  # int64 [N], each row's slot in the cache
    positions: Tensor,  # int64 [N, q], each token's entry in the slot
    *,
    query_norm: Tensor | None = None,  # [D], weight of an RMSNorm of each query head
    key_norm: Tensor | None = None,  # [D], weight of an RMSNorm of each key head
    eps: float = 1e-6,
    bias: Tensor | None = None,  # [columns]
    lanes: Lanes | None = None,
) -> Tensor:
    """Write the keys and values of new tokens to the cache, and return their rotated queries, [N, q, Hq, D].

    `ragged_attention` takes `result.transpose(1, 2)`. The number of query heads follows from the number of columns.
    Rows must not share a slot. On a GPU, slots and positions are not checked: they must be right, as for
    `ragged_append`.

    Calls that need no gradient run in C++ on the CPU, in float32 and bfloat16 without bias and lanes. On CUDA, ROCm and
    XPU they run in Triton, in float16 too. Other calls run in PyTorch. The lanes get no gradient.

    Raises:
        TypeError: dtypes or devices that differ; slots, positions or adapters that are not int64.
        ValueError: shapes that do not fit together; on the CPU, a slot or position that the cache does not have, or an
            adapter that the lanes do not have.
    """
    return _run(y, cos, sin, keys, values, slots, positions, query_norm, key_norm, eps, bias, *(lanes or (None, None)))
