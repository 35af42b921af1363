"""Calls of guided_sample like one before: launched without checks, and without Triton's own binding.

Checks, plans and Triton's binder look at shapes, strides, dtypes, devices, and at which addresses are multiples of 16.
So a call that has the same of all these launches the same compiled kernels, with other addresses: `known` does so, as
Triton's `CompiledKernel[grid](*arguments)` does, and takes all memory between kernels in one piece (docs/triton.md,
"Calls from Python").

Only on CUDA: for ROCm Triton specialises by the sizes of tensors, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ..philox import as_int64
from .arguments import OFF, RANGES
from .reference import GuidedSample
from .triton import NAMES, Plan

MOST = 1024  # signatures; then all are forgotten, and soon learnt again
ALIGNED = 16  # bytes: what Triton's kernels are specialised by


class Limits(NamedTuple):
    """Of a parameter that is a number."""

    low: float
    high: float
    off: float | None  # what None means, if it means anything
    whole: bool


LIMITS = [Limits(*RANGES[name], OFF.get(name), type(RANGES[name][0]) is int) for name in NAMES]


class Known(NamedTuple):
    """What `remember` keeps of a call."""

    plan: Plan
    launches: Sequence[tuple[Any, tuple[int, int, int]]]  # Triton's CompiledKernel and its grid
    device: int
    size: int  # bytes of scratch
    starts: tuple[int, ...]  # of its parts


_known: dict[tuple[Any, ...], Known] = {}


def described(
    base: Any, arms: Any, weights: Any, seeds: Any, positions: Any, temperature: Any, top_k: Any, top_p: Any,
    min_p: Any, vocab_size: Any, bias: Any, return_logprobs: Any, top_logprobs: Any,
) -> tuple[tuple[Any, ...], list[int], tuple[Any, ...], tuple[Any, ...]] | None:  # fmt: skip
    """Of a call with these fields of SamplingArguments the signature, and what else its kernels take: addresses of the
    members and then of a bias, weights, parameters. None for a call to look at more closely."""
    if top_logprobs:
        return None
    key: list[Any] = [vocab_size, return_logprobs, bias is None]
    addresses: list[int] = []
    table: list[Any] = []
    parameters: list[Any] = []
    for tensor in (base, *arms) if bias is None else (base, *arms, bias):
        if type(tensor) is not Tensor:
            return None
        addresses.append(place := tensor.data_ptr())
        key += tensor.dtype, tensor.shape, tensor.stride(), tensor.get_device(), tensor.is_neg(), place % ALIGNED
    if type(weights) is Tensor:
        table.append(place := weights.data_ptr())
        key += weights.dtype, weights.shape, weights.stride(), weights.get_device(), weights.is_neg(), place % ALIGNED
    else:
        key.append(len(weights))
        for weight in weights or (0.0,):
            if type(weight) is not float and type(weight) is not int:
                return None
            table.append(float(weight))
    for value, limits in zip((temperature, top_k, top_p, min_p, seeds, positions), LIMITS):
        if type(value) is Tensor:
            parameters.append(place := value.data_ptr())
            key += value.dtype, value.shape, value.stride(), value.get_device(), value.is_neg(), place % ALIGNED
        elif value is None and limits.off is not None:
            parameters.append(limits.off)
            key.append(None)
        elif type(value) is int or (type(value) is float and not limits.whole):
            if not limits.low <= value <= limits.high:
                return None
            key.append(None if value == limits.off else limits.whole and not -(2**31) <= value < 2**31)
            parameters.append(as_int64(int(value)) if limits.whole else float(value))
        else:
            return None
    return tuple(key), addresses, tuple(table), tuple(parameters)


def remember(arguments: Sequence[Any], plan: Plan, kernels: Sequence[Any]) -> None:
    """Keep the kernels that a call launched, unless Triton gave none, as its interpreter does."""
    call = described(*arguments)
    if call is None or not plan.rows or any(kernel is None for kernel in kernels):
        return
    if driver.active.get_current_target().backend != "cuda":
        return
    starts, size = [], 0
    for count, dtype in plan.scratch():
        starts.append(size)
        size += -(-count * dtype.itemsize // 256) * 256
    if len(_known) >= MOST:
        _known.clear()
    launches = [(kernel, grid) for kernel, (_, grid, _) in zip(kernels, plan.kernels)]
    _known[call[0]] = Known(plan, launches, driver.active.get_current_device(), size, tuple(starts))


def known(*arguments: Any) -> GuidedSample | None:
    """The result of a call like one before; None for others."""
    if not _known:
        return None
    call = described(*arguments)
    if call is None:
        return None
    signature, addresses, weights, parameters = call
    found = _known.get(signature)
    if found is None or driver.active.get_current_device() != found.device:
        return None
    plan, launches, device, size, starts = found
    outputs = plan.outputs()
    begin = (scratch := torch.empty(size, dtype=torch.uint8, device=plan.device)).data_ptr()
    places, bits = [output.data_ptr() for output in outputs], begin
    for place in places:
        bits |= place
    if bits % ALIGNED:  # no allocator of today
        return None
    parts = [begin + start for start in starts]
    members = tuple(addresses[: plan.members])
    bias = addresses[-1] if len(addresses) > plan.members else begin
    values = plan.arguments(members, weights, bias, parameters, parts, places)
    stream, hooks = driver.active.get_current_stream(device), knobs.runtime
    watched = getattr(hooks.launch_enter_hook, "calls", True) or getattr(hooks.launch_exit_hook, "calls", True)
    for (kernel, grid), each in zip(launches, values):
        if watched:  # by a profiler, say
            kernel[grid](*each, stream=stream)
        else:  # as Triton does there, without what its hooks would be told, which takes half of the time
            kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *each)
    del scratch  # whose memory is free for what follows on this stream
    return tuple.__new__(GuidedSample, (*outputs, None, None, None, None)[:6])
