"""Linear layer of few rows over bfloat16 weights, at the speed at which the weights arrive from memory.

    y = x Wᵀ + bias, and for the rows of each span      y += scale · (x Aᵀ) B

A decode step reads every weight once for a handful of rows. The C++ core (kernels/csrc/small_linear.cpp) fetches each
weight once for up to 16 rows, multiplies bfloat16 pairs into float32 sums, adds bias and LoRA to those, and rounds
once.

The order of each sum depends on nothing but `in`: a row's result is bit for bit the same alone or among others, for any
number of threads, and on every instruction set. Where the core does not serve (no AVX2, other dtypes, other devices)
PyTorch does, without that guarantee.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, get_num_threads, is_grad_enabled
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn import functional

from . import _native, custom_ops

NO_GRADIENT = "x requires grad: small_linear has no gradient, call it in torch.inference_mode()"


class Lora(NamedTuple):
    """A low-rank addition to a linear: scale · (x aᵀ) b."""

    a: Tensor  # [r, in], as PEFT's lora_A
    b: Tensor  # [r, out], the transpose of PEFT's lora_B: read in the order in which outputs are made
    scale: float


Span = tuple[int, int, int]  # rows first .. last - 1 get the LoRA of that index; rows are flattened


class SmallLinear:
    """y = x Wᵀ + bias, prepared once for many calls, each of which costs 1.5 µs more than its arithmetic.

    weight: [out, in]; bias: [out]; `loras` share their dtype and device. The tensors are kept, and read at every call:
    changes in place count, but not those of one that is not contiguous (PEFT's lora_B transposed), which is copied. A
    moved or replaced parameter needs a new SmallLinear; so does one whose storage moves under it (`share_memory_`, see
    `moved`): the addresses are kept, since looking them up misses the caches. It has no gradient.

    Raises:
        ValueError: shapes that do not fit together, or tensors of different dtypes or devices.
    """

    # few cache lines to miss
    __slots__ = ("_address", "_core", "bias", "in_features", "loras", "out_features", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, loras: Sequence[Lora] = ()) -> None:
        _check(weight, bias, loras)
        self.weight = weight.detach().contiguous()
        self.bias = None if bias is None else bias.detach().contiguous()
        self.loras = [Lora(a.detach().contiguous(), b.detach().contiguous(), float(scale)) for a, b, scale in loras]
        self.out_features, self.in_features = weight.shape
        self._core = _in_core([self])
        self._address = 0 if self._core is None else self.weight.data_ptr()

    @property
    def moved(self) -> bool:
        """Whether the weight's storage has moved since, as `share_memory_` does: a call would crash."""
        return self._core is not None and self.weight.data_ptr() != self._address

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are prepared anew: the core's addresses are those of these tensors."""
        return SmallLinear, (self.weight, self.bias, self.loras)

    def __call__(self, x: Tensor, spans: Sequence[Span] = ()) -> Tensor:
        """x [..., in] → [..., out]. Raises ValueError for another width, dtype or device, or spans out of range."""
        if is_grad_enabled() and x.requires_grad:
            raise ValueError(NO_GRADIENT)
        if self._core is not None and not is_dynamo_compiling():
            y = self._core.run(x, get_num_threads(), spans)
            if y is not None:
                return y[0]
        if is_compiling():  # what other tracers hand in, the core does not take
            loras = [(first, last, *self.loras[index]) for first, last, index in map(self._checked, spans)]
            return custom_ops.small_linear(x, self.weight, self.bias, loras)
        if x.shape[-1:] != (self.in_features,) or x.dtype != self.weight.dtype or x.device != self.weight.device:
            raise ValueError(
                f"x of shape {tuple(x.shape)}, {x.dtype} on {x.device}: expected [..., {self.in_features}], "
                f"{self.weight.dtype} on {self.weight.device}, as the weight"
            )
        if self._core is not None:
            flat = _native.plain(x).reshape(x.shape[:-1].numel(), self.in_features).contiguous()
            y = self._core.run(flat, get_num_threads(), spans)
            if y is not None:
                return y[0].view(*x.shape[:-1], self.out_features)
        return self._in_pytorch(x, spans)

    def _checked(self, span: Span, rows: int | None = None) -> Span:
        whole = isinstance(span, tuple) and all(isinstance(i, int) or hasattr(i, "__index__") for i in span)
        if not whole or len(span) != 3:
            raise TypeError(f"span {span!r}: expected (first row, last row, LoRA), three ints")
        first, last, index = span
        if not (0 <= index < len(self.loras) and (rows is None or 0 <= first <= last <= rows)):
            raise ValueError(f"span {span}: expected rows within 0..{rows}, one of {len(self.loras)} LoRAs")
        return span

    def _in_pytorch(self, x: Tensor, spans: Sequence[Span]) -> Tensor:
        rows = x.shape[:-1].numel()
        checked = [self._checked(span, rows) for span in spans]
        y = functional.linear(x, self.weight, self.bias)
        flat_x, flat_y = x.reshape(rows, self.in_features), y.view(rows, self.out_features)
        for first, last, index in checked:
            a, b, scale = self.loras[index]
            autocast = y.dtype != x.dtype
            if autocast or (x.is_cpu and x.dtype != torch.float32):  # small products are faster in float32 there
                flat_y[first:last] += (scale * (flat_x[first:last].float() @ a.float().T @ b.float())).to(y.dtype)
            else:
                flat_y[first:last].addmm_(flat_x[first:last] @ a.T, b, alpha=scale)
        return y


class SiblingLinears:
    """Linears over one input, such as query, key and value, in one call: their weights stream as those of one matrix.

    Raises:
        ValueError: no linears.
    """

    def __init__(self, linears: Sequence[SmallLinear]) -> None:
        if not linears:
            raise ValueError("linears=[]: expected one or more")
        self.linears = list(linears)
        self._core = _in_core(self.linears) if len({linear.in_features for linear in self.linears}) == 1 else None

    def __reduce__(self) -> tuple[Any, ...]:
        return SiblingLinears, (self.linears,)

    def __call__(self, x: Tensor, spans: Sequence[Sequence[Span]]) -> Sequence[Tensor]:
        """`linear(x, spans[i])` of each linear, bit for bit. Raises as they do, and ValueError if spans lack some."""
        if len(spans) != len(self.linears):
            raise ValueError(f"spans for {len(spans)} linears: expected {len(self.linears)}")
        if self._core is not None and not is_dynamo_compiling() and not (is_grad_enabled() and x.requires_grad):
            y: Sequence[Tensor] | None = self._core.run(x, get_num_threads(), *spans)
            if y is not None:
                return y
        return [linear(x, own) for linear, own in zip(self.linears, spans)]


def small_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    loras: Sequence[tuple[int, int, Tensor, Tensor, float]] = (),
) -> Tensor:
    """x [..., in], weight [out, in], bias [out] → [..., out]; for many calls, prepare a `SmallLinear`.

    loras: (first row, last row, a [r, in], b [r, out], scale) each; rows first .. last - 1 of the flattened x get
    scale · (x aᵀ) b. bfloat16 on a CPU with AVX2 runs in C++, everything else in PyTorch.

    Raises:
        ValueError: shapes that do not fit together, tensors of different dtypes or devices, rows out of range.
    """
    if is_compiling():
        if is_grad_enabled() and x.requires_grad:
            raise ValueError(NO_GRADIENT)
        return custom_ops.small_linear(x, weight, bias, loras)
    linear = SmallLinear(weight, bias, [Lora(*lora[2:]) for lora in loras])
    return linear(x, [(first, last, i) for i, (first, last, *_) in enumerate(loras)])


def _in_core(linears: Sequence[SmallLinear]) -> Any:
    """The C++ core's view of linears of one width, which must outlive it; None where PyTorch has to serve."""
    if _native.core is None or not all(map(_streams, linears)):
        return None
    return _native.core.linears(
        tuple(
            (
                own.weight.data_ptr(),
                0 if own.bias is None else own.bias.data_ptr(),
                own.out_features,
                own.in_features,
                tuple((a.data_ptr(), b.data_ptr(), a.shape[0], scale) for a, b, scale in own.loras),
            )
            for own in linears
        )
    )


def _streams(linear: SmallLinear) -> bool:
    """Whether its tensors lie in the CPU's memory as bfloat16; those of a subclass (quantised, fake) need not."""
    tensors = [linear.weight, *(t for a, b, _ in linear.loras for t in (a, b))]
    tensors += [] if linear.bias is None else [linear.bias]
    plain = linear.weight.is_cpu and linear.weight.dtype == torch.bfloat16 and {*map(type, tensors)} == {Tensor}
    return plain and all(tensor.data_ptr() or not tensor.numel() for tensor in tensors)


def _check(weight: Tensor, bias: Tensor | None, loras: Sequence[Lora]) -> None:
    if weight.ndim != 2 or not weight.dtype.is_floating_point:
        raise ValueError(f"weight of shape {tuple(weight.shape)}, {weight.dtype}: expected [out, in], floating point")
    out_features, in_features = weight.shape
    named: list[tuple[str, Tensor, tuple[int, ...]]] = [] if bias is None else [("bias", bias, (out_features,))]
    for i, (a, b, _) in enumerate(loras):
        rank = a.shape[0] if a.ndim else 0
        named += [(f"loras[{i}].a", a, (rank, in_features)), (f"loras[{i}].b", b, (rank, out_features))]
    for name, tensor, shape in named:
        if tensor.shape != shape or tensor.dtype != weight.dtype or tensor.device != weight.device:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}: "
                f"expected {shape}, {weight.dtype} on {weight.device}, as the weight"
            )
