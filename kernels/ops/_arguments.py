"""Checks that every implementation of guided_sample makes before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

RANGES = {  # inclusive; tensors are not read, since that would stop a GPU's queue
    "temperature": (0.0, torch.finfo(torch.float32).max),
    "top_k": (0, 2**63 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "seeds": (0, 2**64 - 1),
    "positions": (0, 2**32 - 1),
}


def check_arguments(
    base: Tensor,
    arms: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    vocab_size: int | None,
    logit_bias: Tensor | None,
    top_logprobs: int,
    **parameters: Tensor | float,  # one for each of RANGES
) -> int:
    """The size of the vocabulary that counts. Raises TypeError or ValueError naming the argument."""
    _check_logits("base_logits", base)
    if base.ndim not in (2, 3):
        raise ValueError(f"base_logits of shape {tuple(base.shape)}: expected [R, V] or [R, q, V]")
    shape = base.shape[:-1]
    narrowest = base.shape[-1]
    for i, logits in enumerate(arms):
        _check_logits(f"arm_logits[{i}]", logits)
        if logits.shape[:-1] != shape:
            raise ValueError(f"arm_logits[{i}] of shape {tuple(logits.shape)}: expected {(*shape, 'V')}")
        if logits.device != base.device:
            raise ValueError(f"arm_logits[{i}] on {logits.device}: expected {base.device}, where base_logits is")
        narrowest = min(narrowest, logits.shape[-1])
    vocab_size = narrowest if vocab_size is None else vocab_size
    _check_number("vocab_size", vocab_size, 1, narrowest, ", the narrowest member")
    _check_number("top_logprobs", top_logprobs, 0, vocab_size)

    weights_shape = _shape_of_weights(weights)
    if weights_shape not in ((len(arms),), (shape[0], len(arms))):
        raise ValueError(f"weights of shape {weights_shape}: expected [m] or [R, m], R = {shape[0]}, m = {len(arms)}")
    if logit_bias is not None:
        if not isinstance(logit_bias, Tensor):
            raise TypeError(f"logit_bias of {type(logit_bias)}: expected a tensor [V] or [R, V]")
        rows, width = logit_bias.shape[:-1], logit_bias.shape[-1] if logit_bias.ndim else 0
        if width < vocab_size or rows not in ((), (shape[0],)):
            raise ValueError(
                f"logit_bias of shape {tuple(logit_bias.shape)}: expected [V] or [R, V] = [{shape[0]}, {vocab_size}+]"
            )
    for name, value in parameters.items():
        low, high = RANGES[name]
        if not isinstance(value, Tensor):
            _check_number(name, value, low, high)
        elif value.ndim and value.shape != shape[: value.ndim]:
            raise ValueError(f"{name} of shape {tuple(value.shape)}: expected a scalar or {tuple(shape)}, by row")
        elif isinstance(low, int) and value.dtype.is_floating_point:
            raise TypeError(f"{name} of dtype {value.dtype}: expected integers")
    return vocab_size


def _check_logits(name: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} of {type(logits)}: expected a tensor")
    if not logits.dtype.is_floating_point:
        raise TypeError(f"{name} of dtype {logits.dtype}: expected floating point")


def _check_number(name: str, value: Any, low: float, high: float, why: str = "") -> None:
    whole = isinstance(low, int)
    plain = isinstance(value, int if whole else (int, float))
    if not plain and (getattr(value, "shape", None) or not hasattr(value, "__index__" if whole else "__float__")):
        raise TypeError(f"{name}={value!r}: expected {'an integer' if whole else 'a number'}")
    if not low <= value <= high:
        raise ValueError(f"{name}={value}: expected {low}..{high}{why}")


def _shape_of_weights(weights: Tensor | Sequence) -> tuple[int, ...]:
    """That of a tensor, of a list of numbers, or of a list of such lists."""
    if hasattr(weights, "shape"):
        return tuple(weights.shape)
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights={weights!r}: expected a tensor or a list of numbers")
    return (len(weights), len(weights[0])) if weights and isinstance(weights[0], (list, tuple)) else (len(weights),)
