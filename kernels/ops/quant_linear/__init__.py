"""quant_linear: a linear layer over weights of 8 or 4 bits (maths: reference.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from .. import _native
from .._dispatch import dispatcher
from ..small_linear import cpu
from ..small_linear.reference import Lora, Span
from . import custom_op
from .arguments import check_added, check_call
from .reference import specification
from .rounding import exact, quantize
from .weights import QuantWeight, check_weight, dequantize, pack, unpack, unpack_rows

__all__ = ["QuantLinear", "QuantWeight", "dequantize", "exact", "quant_linear", "quant_linear_reference", "quantize"]

NO_GRADIENT = "x requires grad: quant_linear has no gradient, call it in torch.inference_mode()"


class QuantLinear:
    """y = x Wᵀ + bias over weights of 8 or 4 bits, packed once for many calls.

    weight: a `QuantWeight` of [out, in]; bias: bfloat16 [out]; loras: bfloat16, on the weight's device. It has no
    gradient. Where there is no C++ core, the reference serves: the same bits, slowly.

    Raises:
        TypeError: a weight that is none.
        ValueError: shapes that do not fit together, other dtypes, codes out of range, scales that are NaN or infinite.
    """

    __slots__ = ("_core", "bias", "bits", "in_features", "loras", "out_features", "packed")

    def __init__(self, weight: QuantWeight, bias: Tensor | None = None, loras: Sequence[Lora] = ()) -> None:
        check_weight(weight)
        out, width = weight.codes.shape
        self._set(pack(weight), out, width, weight.bits, bias, loras)

    def _set(self, packed: Tensor, out: int, width: int, bits: int, bias: Tensor | None, loras: Sequence[Lora]) -> None:
        check_added((out, width), packed.device, bias, loras)
        self.packed, self.out_features, self.in_features, self.bits = packed, out, width, bits
        _, self.bias, self.loras = cpu.readable(packed, bias, loras)
        self._core = cpu.prepare([self])

    @classmethod
    def from_packed(
        cls, packed: Tensor, out: int, width: int, bits: int, bias: Tensor | None = None, loras: Sequence[Lora] = ()
    ) -> QuantLinear:
        """Over codes that another one packed: its `packed`, which is shared, not copied."""
        self = cls.__new__(cls)
        self._set(packed, out, width, bits, bias, loras)
        return self

    @property
    def weight(self) -> QuantWeight:
        """The weight, unpacked."""
        return unpack(self.packed, self.out_features, self.in_features, self.bits)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def moved(self) -> bool:
        """Whether the storage of the codes has moved since: never, nobody else has it."""
        return False

    def described(self) -> tuple[Any, ...] | None:
        """For the C++ core, None where that does not read the tensors: see small_linear's cpu.py."""
        if not cpu.plain([self.packed], torch.uint8) or self.packed.data_ptr() % 64:
            return None
        return cpu.described(self.packed.data_ptr(), self.shape, self.bias, self.loras, self.bits)

    def rows(self, indices: Tensor) -> Tensor:
        """The weight's outputs of these indices, int64 [...] → bfloat16 [..., in]: what an embedding looks up."""
        flat = indices.reshape(-1)
        found = dequantize(unpack_rows(self.packed, flat, self.in_features, self.bits)).to(torch.bfloat16)
        return found.view(*indices.shape, self.in_features)

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantLinear.from_packed, (self.packed, *self.shape, self.bits, self.bias, self.loras)

    def __call__(self, x: Tensor, spans: Sequence[Span] = ()) -> Tensor:
        """x bfloat16 [..., in] → [..., out]. Raises ValueError for another width, dtype or device, or wrong spans."""
        if is_grad_enabled() and x.requires_grad:
            raise ValueError(NO_GRADIENT)
        return _run(x, self, spans)


def _check(x: Tensor, linear: QuantLinear, spans: Sequence[Span]) -> None:
    check_call(x, linear.shape, linear.packed.device, linear.loras, spans)


def _in_pytorch(x: Tensor, linear: QuantLinear, spans: Sequence[Span]) -> Tensor:
    return specification(x, linear.weight, linear.bias, linear.loras, spans)


def _in_core(x: Tensor, linear: QuantLinear, spans: Sequence[Span]) -> Tensor | None:
    if linear._core is None:
        return None
    y = linear._core.run(x, spans)
    return None if y is None else y[0]


def _convert(x: Tensor, *rest: Any) -> tuple[Any, ...] | None:
    return (_native.plain(x).contiguous(), *rest)


def _traced(x: Tensor, linear: QuantLinear, spans: Sequence[Span]) -> Tensor:
    return custom_op.call(x, linear.packed, *linear.shape, linear.bits, linear.bias, linear.loras, spans)


_run = dispatcher(_in_pytorch, check=_check, cpu=_in_core, convert=_convert, custom_op=_traced)


def _from_packed(
    x: Tensor, packed: Tensor, out: int, width: int, bits: int, bias: Tensor | None, loras: Any, spans: Any
) -> Tensor:
    return QuantLinear.from_packed(packed, out, width, bits, bias, loras)(x, spans)


custom_op.implement(_from_packed)


def quant_linear(
    x: Tensor,
    weight: QuantWeight,
    bias: Tensor | None = None,
    *,
    loras: Sequence[tuple[int, int, Tensor, Tensor, float]] = (),
) -> Tensor:
    """x bfloat16 [..., in], weight [out, in], bias [out] → [..., out]; for many calls, prepare a `QuantLinear`.

    loras: (first row, last row, a [r, in], b [r, out], scale) each; rows first .. last - 1 of the flattened x get
    scale · (x aᵀ) b.

    Raises:
        TypeError, ValueError: as `QuantLinear`, and rows out of range.
    """
    own = [Lora(*lora[2:]) for lora in loras]
    return QuantLinear(weight, bias, own)(x, [(first, last, i) for i, (first, last, *_) in enumerate(loras)])


def quant_linear_reference(
    x: Tensor,
    weight: QuantWeight,
    bias: Tensor | None = None,
    *,
    loras: Sequence[tuple[int, int, Tensor, Tensor, float]] = (),
) -> Tensor:
    """`quant_linear` in plain PyTorch, for comparison: the same bits where there is no LoRA."""
    check_weight(weight)
    own = [Lora(*lora[2:]) for lora in loras]
    spans = [(first, last, i) for i, (first, last, *_) in enumerate(loras)]
    shape = (weight.codes.shape[0], weight.codes.shape[1])
    check_added(shape, weight.codes.device, bias, own)
    check_call(x, shape, weight.codes.device, own, spans)
    return specification(x, weight, bias, own, spans)
