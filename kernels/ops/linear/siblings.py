"""Linears over one input in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._dispatch import dispatcher
from . import cpu
from .lora import Span


def _one_by_one(x: Tensor, linears: Sequence[Any], spans: Any, _prepared: Any) -> Sequence[Tensor]:
    return [linear(x, own) for linear, own in zip(linears, spans)]


def _side_by_side(*arguments: Any) -> Tensor:
    return torch.cat(list(_one_by_one(*arguments)), -1)


_run = dispatcher(_one_by_one, cpu=cpu.run_siblings, differentiable=1)
_run_stacked = dispatcher(_side_by_side, cpu=cpu.run_stacked, differentiable=1)


class SiblingLinears:
    """Linears over one input, such as query, key and value, in one call: their weights stream as those of one matrix.

    linears: SmallLinears, or QuantLinears (quant_linear), or some of both.

    Raises:
        ValueError: no linears.
    """

    def __init__(self, linears: Sequence[Any]) -> None:
        if not linears:
            raise ValueError("linears=[]: expected one or more")
        self.linears = list(linears)
        same_width = len({linear.in_features for linear in self.linears}) == 1
        self._core = cpu.prepare(self.linears) if same_width else None

    @property
    def prepared(self) -> Any:
        """The C++ core's view of the linears, for calls that run several such; None where PyTorch has to serve."""
        return self._core

    def __reduce__(self) -> tuple[Any, ...]:
        return SiblingLinears, (self.linears,)

    def __call__(self, x: Tensor, spans: Sequence[Sequence[Span]]) -> Sequence[Tensor]:
        """`linear(x, spans[i])` of each linear, bit for bit. Raises as they do, and ValueError if spans lack some."""
        self._check(spans)
        return _run(x, self.linears, spans, self._core)

    def stacked(self, x: Tensor, spans: Sequence[Sequence[Span]]) -> Tensor:
        """The same as one tensor [..., sum of outputs], side by side."""
        self._check(spans)
        return _run_stacked(x, self.linears, spans, self._core)

    def _check(self, spans: Sequence[Sequence[Span]]) -> None:
        if len(spans) != len(self.linears):
            raise ValueError(f"spans for {len(spans)} linears: expected {len(self.linears)}")
