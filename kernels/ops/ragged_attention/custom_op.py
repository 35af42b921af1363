"""ragged_attention and ragged_append as custom ops: one node each in a compiled or exported graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import _custom_op


def _fake_attention(query: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    rows, heads, block, _width = query.shape
    return query.new_empty((rows, block, heads, values.shape[3]))


attention = _custom_op.define(
    "ragged_attention(Tensor query, Tensor keys, Tensor values, Tensor slots, Tensor positions, float scale, "
    "SymInt? window, float? softcap, SymInt? limit, Tensor? arrivals=None) -> Tensor",
    _fake_attention,
)
append = _custom_op.define(
    "ragged_append(Tensor(a!) keys, Tensor(b!) values, Tensor new_keys, Tensor new_values, Tensor slots, "
    "Tensor positions) -> ()",
    lambda *_: None,
)


def implement(run_attention: Callable[..., Tensor], run_append: Callable[..., bool | None]) -> None:
    """Let the ops run these functions, which take their arguments by position."""

    def append_in_place(*tensors: Tensor) -> None:
        run_append(*tensors)

    _custom_op.implement(attention, run_attention)
    _custom_op.implement(append, append_in_place)
