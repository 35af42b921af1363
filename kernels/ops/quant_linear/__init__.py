"""quant_linear: a linear layer over weights of 8 or 4 bits (maths: reference.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from .. import _native
from .._dispatch import dispatcher
from ..linear import cpu
from ..linear.arguments import NO_GRADIENT, check_added, check_call, check_input
from ..linear.lora import Lora, RowsLora, Span, split
from . import custom_op
from .reference import specification
from .rounding import exact, quantize
from .weights import GROUP, TILE, QuantWeight, check_weight, dequantize, pack, unpack, unpack_rows

__all__ = ["QuantLinear", "QuantWeight", "dequantize", "exact", "quant_linear", "quant_linear_reference", "quantize"]


class QuantLinear:
    """A linear layer y = x Wᵀ + bias over weights of 8 or 4 bits, which are packed once for many calls.

    weight: a `QuantWeight` of [out, in]; bias: bfloat16 [out]; loras: bfloat16, on the weight's device. The layer has
    no gradient. Without the C++ core, the reference serves. It is slow, and gives the same bits if there is no LoRA.

    Raises:
        TypeError: a weight that is not a QuantWeight.
        ValueError: shapes that do not fit together, other dtypes, codes out of range, scales that are NaN or infinite.
    """

    __slots__ = ("_core", "bias", "bits", "in_features", "loras", "out_features", "packed")

    def __init__(self, weight: QuantWeight, bias: Tensor | None = None, loras: Sequence[Lora] = ()) -> None:
        check_weight(weight)
        out, width = weight.codes.shape
        self._set(pack(weight), out, width, weight.bits, bias, loras)

    def _set(self, packed: Tensor, out: int, width: int, bits: int, bias: Tensor | None, loras: Sequence[Lora]) -> None:
        check_added((out, width), torch.bfloat16, packed.device, bias, loras)
        self.packed, self.out_features, self.in_features, self.bits = packed, out, width, bits
        _, self.bias, self.loras = cpu.readable(packed, bias, loras)
        self._core = cpu.prepare([self])

    @classmethod
    def from_packed(
        cls, packed: Tensor, out: int, width: int, bits: int, bias: Tensor | None = None, loras: Sequence[Lora] = ()
    ) -> QuantLinear:
        """Make a layer over the `packed` weight of another one. The memory is shared, not copied."""
        self = cls.__new__(cls)
        self._set(packed, out, width, bits, bias, loras)
        return self

    @property
    def weight(self) -> QuantWeight:
        """The weight, unpacked anew at each access."""
        return unpack(self.packed, self.out_features, self.in_features, self.bits)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs and outputs."""
        return torch.bfloat16

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def moved(self) -> bool:
        """Whether the storage of the codes has moved since the layer was made. It never does: nothing else owns it."""
        return False

    def described(self) -> tuple[Any, ...] | None:
        """Return the layer's description for the C++ core; None if the core can't read its tensors (linear/cpu.py)."""
        if not cpu.plain([self.packed], torch.uint8) or self.packed.data_ptr() % 64:
            return None
        return cpu.described(self.packed, self, self.bits)

    def sample(self, count: int) -> list[Tensor]:
        """Return `count` bytes of codes, and `count` scales and minimums as int16, evenly spaced over all of them.

        The samples tell different weights apart.
        """
        size = TILE * GROUP * self.bits // 8
        halves = self.packed[..., size:].contiguous().view(torch.int16)
        parts = [part.flatten() for part in (self.packed[..., :size], halves) if part.numel()]
        return [part[torch.arange(count, device=part.device) * (len(part) - 1) // (count - 1)] for part in parts]

    def rows(self, indices: Tensor) -> Tensor:
        """Return the weight's rows of these outputs, int64 [...] → bfloat16 [..., in], as an embedding looks them up.

        Raises IndexError for an index outside [0, out).
        """
        if _native.core is not None and not is_compiling():
            rows = _native.core.quant_rows(self.packed, indices.contiguous(), *self.shape, self.bits)
            if rows is not None:
                return rows[0].view(*indices.shape, self.in_features)
        return rows_in_pytorch(self, indices)

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantLinear.from_packed, (self.packed, *self.shape, self.bits, self.bias, self.loras)

    def __call__(self, x: Tensor, spans: Sequence[Span] = ()) -> Tensor:
        """Return y, bfloat16 [..., out], for x bfloat16 [..., in]. spans: the rows that each LoRA applies to.

        Raises ValueError for another width, dtype or device, and for spans out of range.
        """
        if is_grad_enabled() and x.requires_grad:
            raise ValueError(f"quant_linear: {NO_GRADIENT}")
        return _run(x, self, spans)


def rows_in_pytorch(linear: QuantLinear, indices: Tensor) -> Tensor:
    """Return what `QuantLinear.rows` returns, in PyTorch."""
    flat = indices.reshape(-1)
    if not is_compiling() and flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < linear.out_features:
        raise IndexError(f"indices from {int(flat.min())} to {int(flat.max())}: expected {linear.out_features} rows")
    found = dequantize(unpack_rows(linear.packed, flat, linear.in_features, linear.bits)).to(torch.bfloat16)
    return found.view(*indices.shape, linear.in_features)


def _in_pytorch(x: Tensor, linear: QuantLinear, spans: Sequence[Span]) -> Tensor:
    return specification(x, linear.weight, linear.bias, linear.loras, spans)


def _traced(x: Tensor, linear: QuantLinear, spans: Sequence[Span]) -> Tensor:
    held = (linear.packed, *linear.shape, linear.bits)
    return custom_op.call(x, held, linear.bias, linear.loras, spans)


_run = dispatcher(_in_pytorch, check=check_call, cpu=cpu.run, convert=cpu.convert, custom_op=_traced)


def _from_packed(x: Tensor, held: Sequence[Any], bias: Tensor | None, loras: Sequence[RowsLora]) -> Tensor:
    own, spans = split(loras)
    packed, out, width, bits = held
    return QuantLinear.from_packed(packed, out, width, bits, bias, own)(x, spans)


custom_op.implement(_from_packed)


def quant_linear(
    x: Tensor, weight: QuantWeight, bias: Tensor | None = None, *, loras: Sequence[RowsLora] = ()
) -> Tensor:
    """Return x Wᵀ + bias, bfloat16 [..., out]. For many calls, prepare a `QuantLinear`.

    x: bfloat16 [..., in]; weight: [out, in]; bias: bfloat16 [out].
    loras: (first row, last row, a [r, in], b [r, out], scale) for each. Rows first .. last - 1 of the flattened x get
    scale · (x aᵀ) b added.

    Raises:
        TypeError, ValueError: as `QuantLinear`, and rows out of range.
    """
    own, spans = split(loras)
    return QuantLinear(weight, bias, own)(x, spans)


def quant_linear_reference(
    x: Tensor, weight: QuantWeight, bias: Tensor | None = None, *, loras: Sequence[RowsLora] = ()
) -> Tensor:
    """The specification of `quant_linear` in plain PyTorch. It gives the same bits if there is no LoRA."""
    check_weight(weight)
    own, spans = split(loras)
    shape, device = weight.codes.shape, weight.codes.device
    check_added(shape, torch.bfloat16, device, bias, own)
    check_input(x, shape[1], torch.bfloat16, device, own, spans)
    return specification(x, weight, bias, own, spans)
