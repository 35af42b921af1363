"""small_linear: a linear layer of few rows over bfloat16 weights (maths: reference.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from .._dispatch import dispatcher
from . import cpu, custom_op
from .arguments import check_call, check_weights
from .reference import Lora, Span, specification

NO_GRADIENT = "x requires grad: small_linear has no gradient, call it in torch.inference_mode()"


def _in_pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, loras: Any, spans: Any, _prepared: Any) -> Tensor:
    return specification(x, weight, bias, loras, spans)


def _one_by_one(x: Tensor, linears: Sequence[Any], spans: Any, _prepared: Any) -> Sequence[Tensor]:
    return [linear(x, own) for linear, own in zip(linears, spans)]


_run = dispatcher(_in_pytorch, check=check_call, cpu=cpu.run, convert=cpu.convert, custom_op=custom_op.call)
_run_once = dispatcher(_in_pytorch, check=check_call, cpu=cpu.run_once, convert=cpu.convert, custom_op=custom_op.call)
_run_siblings = dispatcher(_one_by_one, cpu=cpu.run_siblings, differentiable=1)


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
        check_weights(weight, bias, loras)
        self.weight, self.bias, self.loras = cpu.readable(weight, bias, loras)
        self.out_features, self.in_features = weight.shape
        self._core = cpu.prepare([self])
        self._address = 0 if self._core is None else self.weight.data_ptr()

    def described(self) -> tuple[Any, ...] | None:
        """For the C++ core, None where that does not read the tensors: see cpu.py."""
        if not cpu.plain([self.weight], torch.bfloat16):
            return None
        return cpu.described(self.weight.data_ptr(), self.weight.shape, self.bias, self.loras, 16)

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
        return _run(x, self.weight, self.bias, self.loras, spans, self._core)


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

    def __reduce__(self) -> tuple[Any, ...]:
        return SiblingLinears, (self.linears,)

    def __call__(self, x: Tensor, spans: Sequence[Sequence[Span]]) -> Sequence[Tensor]:
        """`linear(x, spans[i])` of each linear, bit for bit. Raises as they do, and ValueError if spans lack some."""
        if len(spans) != len(self.linears):
            raise ValueError(f"spans for {len(spans)} linears: expected {len(self.linears)}")
        return _run_siblings(x, self.linears, spans, self._core)


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
    own = [Lora(*lora[2:]) for lora in loras]
    spans = [(first, last, i) for i, (first, last, *_) in enumerate(loras)]
    check_weights(weight, bias, own)
    if is_grad_enabled() and x.requires_grad:
        raise ValueError(NO_GRADIENT)
    return _run_once(x, weight, bias, own, spans, None)


custom_op.implement(small_linear)
