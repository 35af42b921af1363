"""Linears as custom ops: one node in a compiled or exported graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import _custom_op
from .arguments import check_spans
from .lora import Lora, RowsLora, Span


def define(
    name: str, held: str, outputs: Callable[..., int]
) -> tuple[Callable[..., Tensor], Callable[[Callable[..., Tensor]], None]]:
    """Define a custom op for a kind of linear.

    Args:
        name: name of the op.
        held: the op's parameters that hold the weight, as its schema declares them.
        outputs: returns the number of outputs, given the values of these parameters.

    Returns:
        call: the function that calls the op with (x, values of the held parameters, bias, loras, spans).
        implement: the function that registers what the op runs, a function of (x, values of the held parameters, bias,
            tuples of (first row, last row, a, b, scale)).
    """

    def fake(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], outputs(*rest[:-5])))

    op = _custom_op.define(
        f"{name}(Tensor x, {held}, Tensor? bias, Tensor[] a, Tensor[] b, float[] scales, SymInt[] spans) -> Tensor",
        fake,
    )

    def call(
        x: Tensor, weight: Sequence[Any], bias: Tensor | None, loras: Sequence[Lora], spans: Sequence[Span]
    ) -> Tensor:
        """Call the op, which takes one LoRA for each span, as lists of tensors and numbers."""
        check_spans(loras, spans)
        used = [loras[index] for _, _, index in spans]
        a, b, scales = ([lora[i] for lora in used] for i in range(3))
        return op(x, *weight, bias, a, b, scales, [row for span in spans for row in span[:2]])

    def implement(run: Callable[[Tensor, Sequence[Any], Tensor | None, list[RowsLora]], Tensor]) -> None:
        def unpacked(x: Tensor, *rest: Any) -> Tensor:
            *weight, bias, a, b, scales, spans = rest
            return run(x, weight, bias, list(zip(spans[::2], spans[1::2], a, b, scales)))

        _custom_op.implement(op, unpacked)

    return call, implement
