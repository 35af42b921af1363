"""arm_logps: the log-probabilities that a reward model gives a response (maths: reference.py and streamed.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dispatch import dispatcher
from . import custom_op
from .reference import IGNORE, arm_logps_reference
from .streamed import token_logps

__all__ = ["IGNORE", "arm_logps", "arm_logps_reference"]


def _on_gpu(*arguments: Any) -> Tensor | None:
    from . import triton  # the package triton takes half a second to import, and is not on every platform

    return triton.launch(*arguments)


_run = dispatcher(token_logps, triton=_on_gpu, custom_op=custom_op.call)
custom_op.implement(_run)


def arm_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_tokens: bool = False,
) -> Tensor:
    """Return Σ log π of each row's labelled tokens, differentiable in `hidden`, `weight` and `bias`.

    The logits are never in memory in full. PyTorch multiplies block by block. Between the products, Triton kernels run
    on CUDA, ROCm and XPU for float32, bfloat16 and float16, and PyTorch elsewhere.

    Args:
        hidden: [N, T, H] final hidden states, any float dtype.
        weight: [V, H] output embedding, cast to the dtype of `hidden`.
        labels: [N, T] int64. `hidden[n, t]` predicts `labels[n, t]`; the label −100 is ignored. Labels may be on the
            CPU while `hidden` is on a GPU. Then only positions with a label are multiplied. With labels on a GPU all
            positions are, since the host would have to wait for the number of labels.
        bias: [V] of the output layer, if it has one.
        logit_scale: factor on the logits (Cohere, Granite).
        softcap: logits become `softcap · tanh(logits / softcap)` (Gemma 2).
        return_tokens: return every token's log-probability instead, [N, T], 0 where the label is ignored.

    Returns:
        [N] (or [N, T]) in float32, float64 for float64 input. A row without labels gives 0.

    Raises:
        TypeError: labels that are not integers.
        ValueError: shapes that do not fit together, tensors on other devices than `hidden`, a label outside [0, V), a
            softcap that is not above 0. If the labels are on a GPU, a label outside [0, V) fails an assertion there
            instead, as it does in PyTorch's `cross_entropy`.
    """
    _check(hidden, weight, labels, bias, softcap)
    tokens = _run(hidden, weight, labels, bias, logit_scale, softcap)
    return tokens if return_tokens else tokens.sum(-1)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"labels must be [N, T] for hidden [N, T, H], got {tuple(labels.shape)} for {tuple(hidden.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"weight must be [V, {hidden.shape[2]}] for hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}] for weight {tuple(weight.shape)}, got {tuple(bias.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    for name, tensor in (("weight", weight), ("labels", labels), ("bias", bias)):
        if tensor is None or (tensor is labels and tensor.is_cpu):
            continue
        if tensor.device != hidden.device:  # torch 2.13 multiplies with a meta tensor, which has no values
            raise ValueError(f"{name} must be on {hidden.device}, where hidden is, got {tensor.device}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be a finite number above 0, or None, got {softcap}")
