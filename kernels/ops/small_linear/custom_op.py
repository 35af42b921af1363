"""small_linear as a custom op: one node in a compiled or exported graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import _custom_op
from .arguments import check_spans
from .reference import Lora, Span


def call(
    x: Tensor, weight: Tensor, bias: Tensor | None, loras: Sequence[Lora], spans: Sequence[Span], *_: Any
) -> Tensor:
    """The op takes one LoRA for each span, as lists of tensors and numbers."""
    check_spans(loras, spans)
    used = [loras[index] for _, _, index in spans]
    a, b, scales = ([lora[i] for lora in used] for i in range(3))
    return op(x, weight, bias, a, b, scales, [row for span in spans for row in span[:2]])


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


op = _custom_op.define(
    "small_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] a, Tensor[] b, float[] scales, SymInt[] spans) "
    "-> Tensor",
    _fake,
)


def implement(run: Callable[..., Tensor]) -> None:
    """Let the op run `run` (x, weight, bias, loras of (first, last, a, b, scale))."""

    def unpacked(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: list[Tensor],
        b: list[Tensor],
        scales: list[float],
        spans: list[int],
    ) -> Tensor:
        return run(x, weight, bias, loras=list(zip(spans[::2], spans[1::2], a, b, scales)))

    _custom_op.implement(op, unpacked)
