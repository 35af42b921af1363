"""rotary_append as a custom op: one node in a compiled or exported graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _custom_op
from .reference import query_heads


def _fake(y: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
    heads, _ = query_heads(y, keys, values, rest[-2])
    return y.new_empty((*y.shape[:2], heads, keys.shape[3]))


call = _custom_op.define(
    "rotary_append(Tensor y, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor slots, "
    "Tensor positions, Tensor? query_norm, Tensor? key_norm, float eps, Tensor? bias, Tensor? b, Tensor? index) "
    "-> Tensor",
    _fake,
)
