"""small_linear: a linear layer over bfloat16 or float32 weights (maths: reference.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from .._dispatch import dispatcher
from ..linear import cpu
from ..linear.arguments import NO_GRADIENT, check_added, check_call, check_input
from ..linear.lora import Lora, RowsLora, Span, split
from . import custom_op
from .reference import in_order, specification

BITS = {torch.bfloat16: 16, torch.float32: 32}  # bits of a weight, for each dtype that the C++ core multiplies


class SmallLinear:
    """A linear layer y = x Wᵀ + bias, prepared once for many calls. A call costs 1.5 µs more than its arithmetic.

    The tensors are kept and read at every call, so that changes in place count. A tensor that is not contiguous (PEFT's
    lora_B transposed) is copied, and later changes of it do not count. A moved or replaced parameter needs a new
    SmallLinear. So does one whose storage moves (`share_memory_`, see `moved`): the addresses are kept, because to look
    them up at each call misses the CPU's caches. A SmallLinear has no gradient.

    Args:
        weight: [out, in], floating point.
        bias: [out], or None.
        loras: LoRAs that calls can name in their spans. bias and LoRAs have the weight's dtype and device.

    Raises:
        ValueError: shapes that do not fit together, or tensors of different dtypes or devices.
    """

    # Slots keep the attributes in few cache lines, so that a call misses fewer of them.
    __slots__ = ("_address", "_core", "bias", "in_features", "loras", "out_features", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, loras: Sequence[Lora] = ()) -> None:
        if weight.ndim != 2 or not weight.dtype.is_floating_point:
            raise ValueError(
                f"weight of shape {tuple(weight.shape)}, {weight.dtype}: expected [out, in], floating point"
            )
        check_added(weight.shape, weight.dtype, weight.device, bias, loras)
        self.weight, self.bias, self.loras = cpu.readable(weight, bias, loras)
        self.out_features, self.in_features = weight.shape
        self._core = cpu.prepare([self])
        self._address = 0 if self._core is None else self.weight.data_ptr()

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def described(self) -> tuple[Any, ...] | None:
        """Return the linear in the form that the C++ core takes; None if the core can't read its tensors."""
        bits = BITS.get(self.dtype)
        return (
            None if bits is None or not cpu.plain([self.weight], self.dtype) else cpu.described(self.weight, self, bits)
        )

    @property
    def moved(self) -> bool:
        """Whether the weight's storage has moved since, as by `share_memory_`. A call would then crash."""
        return self._core is not None and self.weight.data_ptr() != self._address

    def __reduce__(self) -> tuple[Any, ...]:
        """Prepare a copy or an unpickled object anew, because the core holds the addresses of this object's tensors."""
        return SmallLinear, (self.weight, self.bias, self.loras)

    def __call__(self, x: Tensor, spans: Sequence[Span] = ()) -> Tensor:
        """Return y [..., out] of x [..., in], with the LoRA of each span added to its rows.

        Raises:
            ValueError: an x of another width, dtype or device, or one that requires a gradient, or spans out of range.
            TypeError: spans that are not three ints each.
        """
        if is_grad_enabled() and x.requires_grad:
            raise ValueError(f"small_linear: {NO_GRADIENT}")
        return _run(x, self, spans)


def _in_pytorch(x: Tensor, linear: SmallLinear, spans: Sequence[Span]) -> Tensor:
    return specification(x, linear.weight, linear.bias, linear.loras, spans)


def _traced(x: Tensor, linear: SmallLinear, spans: Sequence[Span]) -> Tensor:
    return custom_op.call(x, (linear.weight,), linear.bias, linear.loras, spans)


_run = dispatcher(_in_pytorch, check=check_call, cpu=cpu.run, convert=cpu.convert, custom_op=_traced)


def small_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, loras: Sequence[RowsLora] = ()) -> Tensor:
    """Return x Wᵀ + bias, [..., out]. For many calls, prepare a `SmallLinear` once.

    bfloat16 and float32 on a CPU with AVX2 run in C++. Everything else runs in PyTorch.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out], or None.
        loras: tuples (first row, last row, a [r, in], b [r, out], scale). Rows first .. last - 1 of the flattened x get
            scale · (x aᵀ) b.

    Raises:
        ValueError: shapes that do not fit together, tensors of different dtypes or devices, rows out of range, or an x
            that requires a gradient.
    """
    own, spans = split(loras)
    return SmallLinear(weight, bias, own)(x, spans)


def small_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, loras: Sequence[RowsLora] = ()
) -> Tensor:
    """Return `small_linear` of float32 tensors, computed in plain PyTorch for comparison: it has the C++ core's bits.

    Args:
        x, weight, bias, loras: the arguments of `small_linear`.

    Raises:
        ValueError: shapes that do not fit together, tensors of different dtypes or devices, rows out of range, or a
            weight that is not float32 [out, in].
    """
    if weight.ndim != 2 or weight.dtype != torch.float32:
        raise ValueError(f"weight of shape {tuple(weight.shape)}, {weight.dtype}: expected [out, in], float32")
    own, spans = split(loras)
    check_added(weight.shape, weight.dtype, weight.device, bias, own)
    check_input(x, weight.shape[1], weight.dtype, weight.device, own, spans)
    return in_order(x, weight, bias, own, spans)


custom_op.implement(lambda x, held, bias, loras: small_linear(x, held[0], bias, loras=loras))
