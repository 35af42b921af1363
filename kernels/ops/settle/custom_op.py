"""settle as a custom op: one node in a compiled or exported graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _custom_op
from .arguments import check
from .reference import Settled


def call(*arguments: Any) -> Settled:
    check(*arguments)
    return Settled(*op(*arguments))


def _fake(targets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    rows = targets.shape[:1]
    return (*(targets.new_empty(rows) for _ in range(3)), targets.new_empty(rows, dtype=torch.bool))


op = _custom_op.define(
    "settle(Tensor targets, Tensor drafts, Tensor lengths, Tensor limits, Tensor finished, Tensor stop_ids, "
    "Tensor? draft_counts) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


def implement(run: Callable[..., Settled]) -> None:
    """Let the op run `run`, which takes its arguments by position."""
    _custom_op.implement(op, lambda *arguments: tuple(run(*arguments)))
