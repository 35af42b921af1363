"""quant_linear as a custom op: one node in a compiled or exported graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .. import _custom_op
from ..small_linear.arguments import check_spans
from ..small_linear.reference import Lora, Span


def call(
    x: Tensor,
    packed: Tensor,
    out: int,
    width: int,
    bits: int,
    bias: Tensor | None,
    loras: Sequence[Lora],
    spans: Sequence[Span],
) -> Tensor:
    """The op takes one LoRA for each span, as lists of tensors and numbers."""
    check_spans(loras, spans)
    used = [loras[index] for _, _, index in spans]
    a, b, scales = ([lora[i] for lora in used] for i in range(3))
    return op(x, packed, out, width, bits, bias, a, b, scales, [row for span in spans for row in span[:2]])


def _fake(x: Tensor, packed: Tensor, out: int, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))


op = _custom_op.define(
    "quant_linear(Tensor x, Tensor packed, int out, int width, int bits, Tensor? bias, Tensor[] a, Tensor[] b, "
    "float[] scales, SymInt[] spans) -> Tensor",
    _fake,
)


def implement(run: Callable[..., Tensor]) -> None:
    """Let the op run `run` (x, packed, out, width, bits, bias, loras, spans)."""

    def unpacked(
        x: Tensor,
        packed: Tensor,
        out: int,
        width: int,
        bits: int,
        bias: Tensor | None,
        a: list[Tensor],
        b: list[Tensor],
        scales: list[float],
        spans: list[int],
    ) -> Tensor:
        loras = [Lora(*lora) for lora in zip(a, b, scales)]
        rows = [(first, last, i) for i, (first, last) in enumerate(zip(spans[::2], spans[1::2]))]
        return run(x, packed, out, width, bits, bias, loras, rows)

    _custom_op.implement(op, unpacked)
