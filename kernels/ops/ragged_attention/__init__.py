"""Attention over a static cache whose rows have slots and positions of their own (maths: reference.py)."""

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
    keys: Tensor,  # [S, Hkv, C, D], Hq a multiple of Hkv
    values: Tensor,  # [S, Hkv, C, Dv]
    slots: Tensor,  # int64 [N]: the slot in which a row lives
    positions: Tensor,  # int64 [N, q]: where each query stands; it sees the entries up to there
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    limit: int | None = None,
    arrivals: Tensor | None = None,  # int32 [at least N · Hkv] of zeros
) -> Tensor:
    """Attend each query to the entries 0 .. position of its row's slot → [N, q, Hq, Dv], contiguous.

    In C++ on the CPU for float32 and bfloat16; in Triton on CUDA, ROCm and XPU for these and float16, from caches
    of any strides; with sums in float32, where no gradient is needed. Otherwise `ragged_attention_reference`.
    `limit`, a bound on positions + 1 that the host knows, says how much the reference reads (the whole capacity
    without it), and how many programs share a row on a GPU; without `arrivals` a second kernel combines what they
    give. Entries beyond a position may hold anything, NaN too, and change nothing (the reference: beyond the row's
    furthest position).

    `arrivals`, zeros that only kernels read, saves the second launch for q up to 16 on CUDA: programs count themselves
    there, and the last one of a row's combines them all, in the order of the entries, and leaves zeros. Calls that may
    run at the same time, in streams or graphs, need tensors of their own. One that is too short is not used; N · Hkv
    numbers suffice for rows of up to 16 queries times heads that share a key.

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
    slots: Tensor,  # int64 [N]
    positions: Tensor,  # int64 [N, q]
) -> None:
    """Write row n's new token i to entry positions[n, i] of slot slots[n]; rows must not share a slot.

    In C++ on the CPU, for every dtype, if the cache is contiguous in its last dimension; in Triton on CUDA, ROCm and
    XPU for float32, bfloat16 and float16; where no gradient is needed. Otherwise by `ragged_append_reference`. Nothing
    is written if anything is wrong. On a GPU slots and positions are not looked at, since a check would have to wait
    for it: they must be right, or other memory is written.

    Raises:
        TypeError: dtypes that differ; slots or positions that are not int64.
        ValueError: shapes that do not fit together; on the CPU, a slot or position that the cache does not have.
    """
    _append(keys, values, new_keys, new_values, slots, positions)
