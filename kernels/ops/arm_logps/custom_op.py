"""arm_logps and its gradient as custom ops: each is one node in a compiled or exported graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _custom_op
from .reference import accumulator


def _fake(hidden: Tensor, weight: Tensor, labels: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(labels.shape, dtype=accumulator(hidden.dtype))


def _fake_backward(
    grad: Tensor, wanted: list[bool], hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *_: Any
) -> list[Tensor]:
    return [torch.empty_like(x) for x, needed in zip((hidden, weight, bias), wanted) if needed and x is not None]


call = _custom_op.define(
    "arm_logps(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float scale, float? softcap) -> Tensor", _fake
)
_backward = _custom_op.define(
    "arm_logps_backward(Tensor grad, bool[] wanted, Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, "
    "float scale, float? softcap) -> Tensor[]",
    _fake_backward,
)


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    hidden, weight, labels, bias, *ctx.rest = inputs
    ctx.save_for_backward(hidden, weight, labels, bias)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[3]]  # hidden, weight, bias
    found = iter(_backward(grad, wanted, *ctx.saved_tensors, *ctx.rest))
    hidden, weight, bias = (next(found) if needed else None for needed in wanted)
    return hidden, weight, None, bias, None, None


torch.library.register_autograd(call, _differentiate, setup_context=_save_for_backward, lib=_custom_op.library)


def implement(run: Callable[..., Tensor]) -> None:
    """Let the op and its gradient run `run`, which takes the op's arguments by position."""

    def backward(
        grad: Tensor,
        wanted: list[bool],
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        *rest: Any,
    ) -> list[Tensor]:
        """Run the forward pass again and return the wanted gradients.

        The compiled forward pass keeps nothing for them, because it does not know which gradients are wanted.
        """
        inputs = [
            None if tensor is None else tensor.detach().requires_grad_(needed)
            for tensor, needed in zip((hidden, weight, bias), wanted)
        ]
        with torch.enable_grad():
            tokens = run(inputs[0], inputs[1], labels, inputs[2], *rest)
        return list(torch.autograd.grad(tokens, [x for x in inputs if x is not None and x.requires_grad], grad))

    _custom_op.implement(call, run)
    _custom_op.implement(_backward, backward)
