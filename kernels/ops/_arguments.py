"""Checks that every implementation of guided_sample makes before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

RANGES = {  # inclusive; tensors are not read, since that would stop a GPU's queue
    "temperature": (0.0, math.inf),
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
    if base.ndim not in (2, 3):
        raise ValueError(f"base_logits of shape {tuple(base.shape)}: expected [R, V] or [R, q, V]")
    if not base.dtype.is_floating_point:
        raise TypeError(f"base_logits of dtype {base.dtype}: expected floating point")
    shape = base.shape[:-1]
    narrowest = base.shape[-1]
    for i, logits in enumerate(arms):
        if logits.shape[:-1] != shape:
            raise ValueError(f"arm_logits[{i}] of shape {tuple(logits.shape)}: expected {(*shape, 'V')}")
        if not logits.dtype.is_floating_point:
            raise TypeError(f"arm_logits[{i}] of dtype {logits.dtype}: expected floating point")
        if logits.device != base.device:
            raise ValueError(f"arm_logits[{i}] on {logits.device}: expected {base.device}, where base_logits is")
        narrowest = min(narrowest, logits.shape[-1])
    vocab_size = narrowest if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= narrowest:
        raise ValueError(f"vocab_size={vocab_size}: expected 1..{narrowest}, the narrowest member")
    if not 0 <= top_logprobs <= vocab_size:
        raise ValueError(f"top_logprobs={top_logprobs}: expected 0..{vocab_size}")

    weights_shape = weights.shape if isinstance(weights, Tensor) else _shape(weights)
    if weights_shape not in ((len(arms),), (shape[0], len(arms))):
        raise ValueError(
            f"weights of shape {tuple(weights_shape)}: expected [m] or [R, m], R = {shape[0]}, m = {len(arms)}"
        )
    if logit_bias is not None:
        rows, width = logit_bias.shape[:-1], logit_bias.shape[-1]
        if width < vocab_size or rows not in ((), (shape[0],)):
            raise ValueError(
                f"logit_bias of shape {tuple(logit_bias.shape)}: expected [V] or [R, V] = [{shape[0]}, {vocab_size}+]"
            )
    for name, value in parameters.items():
        if isinstance(value, Tensor):
            if value.ndim and value.shape != shape[: value.ndim]:
                raise ValueError(f"{name} of shape {tuple(value.shape)}: expected a scalar or {tuple(shape)}, by row")
            continue
        low, high = RANGES[name]
        if not low <= value <= high:
            raise ValueError(f"{name}={value}: expected {low}..{high}")
    return vocab_size


def _shape(nested: Sequence) -> tuple[int, ...]:
    """Shape of a list of numbers, or of a list of such lists."""
    return (len(nested), len(nested[0])) if len(nested) and isinstance(nested[0], (list, tuple)) else (len(nested),)
