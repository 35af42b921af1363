"""Several linears over one input, run in one call."""

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
    """Linears over one input, such as query, key and value, in one call. Their weights are read like one matrix.

    linears: any mix of SmallLinears and QuantLinears (quant_linear).

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
        """The C++ core's object for the linears, for calls of the core that run several; None if PyTorch multiplies."""
        return self._core

    def __reduce__(self) -> tuple[Any, ...]:
        return SiblingLinears, (self.linears,)

    def __call__(self, x: Tensor, spans: Sequence[Sequence[Span]]) -> Sequence[Tensor]:
        """Return the output of each linear i, with the bits of `linears[i](x, spans[i])`.

        Raises:
            ValueError: a number of spans other than the number of linears, and the errors of each linear.
            TypeError: spans that are not three ints each.
        """
        self._check(spans)
        return _run(x, self.linears, spans, self._core)

    def stacked(self, x: Tensor, spans: Sequence[Sequence[Span]]) -> Tensor:
        """Return the outputs of all linears side by side in one tensor [..., sum of outputs]. Raises as a call does."""
        self._check(spans)
        return _run_stacked(x, self.linears, spans, self._core)

    def _check(self, spans: Sequence[Sequence[Span]]) -> None:
        if len(spans) != len(self.linears):
            raise ValueError(f"spans for {len(spans)} linears: expected {len(self.linears)}")
