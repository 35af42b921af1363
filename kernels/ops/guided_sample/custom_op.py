"""guided_sample as a custom op: one node in a compiled or exported graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _custom_op
from ..philox import seed_tensor
from .arguments import DTYPES, OFF, SamplingArguments, check
from .reference import GuidedSample


def call(arguments: SamplingArguments) -> GuidedSample:
    """Call the op and return its result. Numbers become tensors first, and filters that are off become None."""
    check(arguments)
    device = arguments.base_logits.device
    tensors: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        value = getattr(arguments, name)
        if name in OFF and not arguments.filtering(name):
            tensors[name] = None
        elif isinstance(value, Tensor):
            tensors[name] = value
        elif name == "seeds" and isinstance(value, int):  # a seed may be up to 2^64 - 1, more than int64 holds
            tensors[name] = seed_tensor([value], device)[0]
        else:
            tensors[name] = torch.full((), value, dtype=dtype, device=device)
    weights = torch.as_tensor(arguments.weights, dtype=torch.float32, device=device)
    inputs = arguments._replace(
        arm_logits=list(arguments.arm_logits), weights=weights, vocab_size=arguments.vocabulary, **tensors
    )
    return GuidedSample(*op(*inputs))


def _fake(*inputs: Any) -> list[Tensor]:
    arguments = SamplingArguments(*inputs)
    base, top = arguments.base_logits, arguments.top_logprobs
    shape = base.shape[:-1]
    sizes: list[tuple[tuple[int, ...], torch.dtype]] = [(shape, torch.int64), (shape, torch.int32)]
    if arguments.return_logprobs or top > 0:
        sizes += [(shape, torch.float32), ((1 + len(arguments.arm_logits), *shape), torch.float32)]
    if top > 0:
        sizes += [((*shape, top), torch.int64), ((*shape, top), torch.float32)]
    return [base.new_empty(size, dtype=dtype) for size, dtype in sizes]


op = _custom_op.define(
    "guided_sample(Tensor base_logits, Tensor[] arm_logits, Tensor weights, Tensor seeds, Tensor positions, "
    "Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, SymInt vocab_size, Tensor? logit_bias, "
    "bool return_logprobs, int top_logprobs) -> Tensor[]",
    _fake,
)


def implement(run: Callable[..., GuidedSample]) -> None:
    """Let the op run `run`, which takes the fields of SamplingArguments by position."""
    _custom_op.implement(op, lambda *inputs: [field for field in run(*inputs) if field is not None])
