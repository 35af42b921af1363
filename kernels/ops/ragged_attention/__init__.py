"""Attention over a static cache in which every row has its own slot and position (maths: reference.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._dispatch import checked_reference, dispatcher
from . import cpu, custom_op
from .arguments import check_append, check_attention
from .reference import append_specification, attention_specification


def _attention_on_gpu(*arguments: Any) -> Tensor | None:
    from . import triton  # the package triton takes half a second to import, and is not on every platform

    return triton.attention(*arguments)


def _append_on_gpu(*tensors: Tensor) -> bool | None:
    from . import triton_append

    return triton_append.append(*tensors)


ragged_attention_reference = checked_reference(check_attention, attention_specification)
ragged_append_reference = checked_reference(check_append, append_specification)
_attention = dispatcher(
    attention_specification,
    check=check_attention,
    cpu=cpu.attention,
    convert=cpu.converted_attention,
    triton=_attention_on_gpu,
    custom_op=custom_op.attention,
    differentiable=3,
)
_append = dispatcher(
    append_specification,
    check=check_append,
    cpu=cpu.append,
    convert=cpu.converted_append,
    triton=_append_on_gpu,
    custom_op=custom_op.append,
    differentiable=4,
)
custom_op.implement(_attention, _append)


def ragged_attention(
    query: Tensor,  # [N, Hq, q, D], any strides
    keys: Tensor,  # [S, Hkv, C, D]; Hq is a multiple of Hkv
    values: Tensor,  # [S, Hkv, C, Dv]
    slots: Tensor,  # int64 [N], each row's slot in the cache
    positions: Tensor,  # int64 [N, q], each query's position; it sees the entries 0 .. position
    *,
    scale: float,  # factor on the products of queries and keys
    window: int | None = None,  # a query sees only the last `window` of these entries
    softcap: float | None = None,  # scores become softcap · tanh(score / softcap)
    limit: int | None = None,  # upper bound on positions + 1 that the host knows; None: the capacity C
    arrivals: Tensor | None = None,  # int32 [at least N · Hkv], zeros: counters for the kernels
) -> Tensor:
    """Attend each query to the entries 0 .. position of its row's slot, and return [N, q, Hq, Dv], contiguous.

    Calls that need no gradient run in C++ on the CPU, in float32 and bfloat16. On CUDA, ROCm and XPU they run in
    Triton, in float16 too, and with caches of any strides. Both sum in float32. Other calls run in
    `ragged_attention_reference`.

    Entries beyond a query's position change nothing, and may even hold NaN. In the reference, only entries beyond the
    row's furthest position may hold NaN.

    limit: the number of entries that the reference reads. On a GPU, it decides how many programs share a row.
    arrivals: saves the launch of a second kernel that combines the programs' results, for q up to 16 on CUDA. The
        programs of a row count themselves there. The last one combines all results in the order of the entries, and
        sets the counter back to 0. Calls that may run at the same time, in streams or graphs, need separate tensors.
        N · Hkv numbers are enough if q · Hq / Hkv is at most 16. A tensor that is too short is not used.

    Raises:
        TypeError: dtypes that differ; slots or positions that are not int64, arrivals that are not int32.
        ValueError: shapes that do not fit together, a window, softcap or limit out of range; on the CPU, a slot or
            position that the cache does not have.
    """
    return _attention(query, keys, values, slots, positions, scale, window, softcap, limit, arrivals)


def ragged_append(
    keys: Tensor,  # [S, Hkv, C, D], written in place
    values: Tensor,  # [S, Hkv, C, Dv], written in place
    new_keys: Tensor,  # [N, Hkv, q, D], any strides
    new_values: Tensor,  # [N, Hkv, q, Dv], any strides
    slots: Tensor,  # int64 [N], each row's slot in the cache
    positions: Tensor,  # int64 [N, q], each token's entry in the slot
) -> None:
    """Write row n's new token i to entry positions[n, i] of slot slots[n]. Rows must not share a slot.

    Calls that need no gradient run in C++ on the CPU, for every dtype, if the caches are contiguous in their last
    dimension. On CUDA, ROCm and XPU they run in Triton, for float32, bfloat16 and float16. Other calls run in
    `ragged_append_reference`. A call that raises an error has written nothing. On a GPU slots and positions are not
    checked, because a check would wait for the device. Wrong ones make the kernel write to other memory.

    Raises:
        TypeError: dtypes that differ; slots or positions that are not int64.
        ValueError: shapes that do not fit together; on the CPU, a slot or position that the cache does not have.
    """
    _append(keys, values, new_keys, new_values, slots, positions)
