"""The list of guided_sample's arguments, and the checks that every implementation relies on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
RANGES = {  # lowest and highest value, for numbers; a tensor's values are not checked, as that would wait for the GPU
    "temperature": (0.0, torch.finfo(torch.float32).max),
    "top_k": (0, 2**63 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "seeds": (0, 2**64 - 1),
    "positions": (0, 2**32 - 1),
}
DTYPES = {  # dtypes in which C++, Triton and the custom op take tensors of parameters
    "seeds": torch.int64,
    "positions": torch.int64,
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
}
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # values that keep all tokens, as None does


class SamplingArguments(NamedTuple):
    """The arguments of `guided_sample`, in the order of the C++ core and of the custom op.

    R rows, q positions in each row, m ARMs, V tokens. A parameter is a number, or a tensor [], [R] or [R, q].
    """

    base_logits: Tensor  # [R, V] or [R, q, V], any float dtype
    arm_logits: Sequence[Tensor]  # m tensors [R, V] or [R, q, V]; V and dtype may differ from the base's
    weights: Tensor | Sequence  # [m] or [R, m]
    seeds: Tensor | int
    positions: Tensor | int
    temperature: Tensor | float = 1.0
    top_k: Tensor | int | None = None
    top_p: Tensor | float | None = None
    min_p: Tensor | float | None = None
    vocab_size: int | None = None
    logit_bias: Tensor | None = None  # [V] or [R, V]
    return_logprobs: bool = False
    top_logprobs: int = 0

    @property
    def vocabulary(self) -> int:
        """The number of tokens that count: `vocab_size`, or the width of the narrowest member."""
        if self.vocab_size is not None:
            return self.vocab_size
        return min(logits.shape[-1] for logits in (self.base_logits, *self.arm_logits))

    def filtering(self, name: str) -> bool:
        """Whether the filter of this name may drop a token. A tensor always may, because its values are not read."""
        value = getattr(self, name)
        return value is not None and (isinstance(value, Tensor) or value != OFF[name])


def unpacked(implementation: Callable[[SamplingArguments], Result]) -> Callable[..., Result]:
    """Return the same implementation, which takes the fields of SamplingArguments by position.

    So a call of the C++ core makes no named tuple. That would cost 0.6 µs, where a small call takes 9 µs (one thread
    of a shared Xeon).
    """

    def run(*arguments: Any) -> Result:
        return implementation(SamplingArguments(*arguments))

    return run


def check(arguments: SamplingArguments) -> None:
    """Check the arguments. Raises TypeError or ValueError that names the argument, its value, and what was expected."""
    base, weights, logit_bias = arguments.base_logits, arguments.weights, arguments.logit_bias
    _check_logits("base_logits", base)
    if base.ndim not in (2, 3):
        raise ValueError(f"base_logits of shape {tuple(base.shape)}: expected [R, V] or [R, q, V]")
    shape = base.shape[:-1]
    narrowest = base.shape[-1]
    for i, logits in enumerate(arguments.arm_logits):
        _check_logits(f"arm_logits[{i}]", logits)
        if logits.shape[:-1] != shape:
            raise ValueError(f"arm_logits[{i}] of shape {tuple(logits.shape)}: expected {(*shape, 'V')}")
        if logits.device != base.device:
            raise ValueError(f"arm_logits[{i}] on {logits.device}: expected {base.device}, where base_logits is")
        narrowest = min(narrowest, logits.shape[-1])
    vocab_size = narrowest if arguments.vocab_size is None else arguments.vocab_size
    _check_number("vocab_size", vocab_size, 1, narrowest, ", the narrowest member")
    _check_number("top_logprobs", arguments.top_logprobs, 0, vocab_size)

    found, rows, arms = _shape_of_weights(weights), shape[0], len(arguments.arm_logits)
    if found not in ((arms,), (rows, arms)):
        raise ValueError(f"weights of shape {found}: expected [m] or [R, m], R = {rows}, m = {arms}")
    if logit_bias is not None:
        if not isinstance(logit_bias, Tensor):
            raise TypeError(f"logit_bias of {type(logit_bias)}: expected a tensor [V] or [R, V]")
        leading, width = logit_bias.shape[:-1], logit_bias.shape[-1] if logit_bias.ndim else 0
        if width < vocab_size or leading not in ((), (rows,)):
            raise ValueError(
                f"logit_bias of shape {tuple(logit_bias.shape)}: expected [V] or [R, V] = [{rows}, {vocab_size}+]"
            )
    for name, (low, high) in RANGES.items():
        value = getattr(arguments, name)
        if value is None and name in OFF:
            continue
        if not isinstance(value, Tensor):
            _check_number(name, value, low, high)
        elif value.ndim and value.shape != shape[: value.ndim]:
            raise ValueError(f"{name} of shape {tuple(value.shape)}: expected a scalar or {tuple(shape)}, by row")
        elif isinstance(low, int) and value.dtype.is_floating_point:
            raise TypeError(f"{name} of dtype {value.dtype}: expected integers")


def _check_logits(name: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} of {type(logits)}: expected a tensor")
    if not logits.dtype.is_floating_point or logits.dtype.itemsize < 2:
        raise TypeError(f"{name} of dtype {logits.dtype}: expected floating point of 16 bits or more")
    if logits.layout != torch.strided:
        raise TypeError(f"{name} of layout {logits.layout}: expected a dense tensor")


def _check_number(name: str, value: Any, low: float, high: float, why: str = "") -> None:
    whole = isinstance(low, int)
    plain = isinstance(value, int if whole else (int, float))
    if not plain and (getattr(value, "shape", None) or not hasattr(value, "__index__" if whole else "__float__")):
        raise TypeError(f"{name}={value!r}: expected {'an integer' if whole else 'a number'}")
    if not low <= value <= high:
        raise ValueError(f"{name}={value}: expected {low}..{high}{why}")


def _shape_of_weights(weights: Tensor | Sequence) -> tuple[int, ...]:
    """Return the shape of a tensor, of a list of numbers, or of a list of such lists."""
    if hasattr(weights, "shape"):
        return tuple(weights.shape)
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights={weights!r}: expected a tensor or a list of numbers")
    return (len(weights), len(weights[0])) if weights and isinstance(weights[0], (list, tuple)) else (len(weights),)
