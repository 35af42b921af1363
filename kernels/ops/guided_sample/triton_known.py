"""Launch a call of guided_sample that resembles an earlier one without checks and without Triton's own binding.

Checks, plans and Triton's binder depend on shapes, strides, dtypes, devices, and on which addresses are multiples of
16. So a call that agrees with an earlier one in all of these launches the same compiled kernels, with other addresses.
`known` launches them as Triton's `CompiledKernel[grid](*arguments)` does. It allocates the scratch memory of all
kernels in one piece (docs/triton.md, "Calls from Python").

This works only on CUDA. For ROCm, Triton's kernels are specialised by the sizes of tensors, too.
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

MOST = 1024  # Most signatures that are kept. One more empties the table, and later calls fill it again.
ALIGNED = 16  # bytes; Triton specialises a kernel by which addresses are multiples of this


class Limits(NamedTuple):
    """The values that a parameter may have if it is a number."""

    low: float  # lowest and highest value
    high: float
    off: float | None  # the value that None stands for; None if the parameter must not be None
    whole: bool  # integers only


LIMITS = [Limits(*RANGES[name], OFF.get(name), type(RANGES[name][0]) is int) for name in NAMES]


class Known(NamedTuple):
    """A call's launches, kept by `remember` for later calls that resemble it."""

    plan: Plan
    launches: Sequence[tuple[Any, tuple[int, int, int]]]  # Triton's CompiledKernel and its grid
    device: int  # index of the CUDA device
    size: int  # bytes of scratch memory
    starts: tuple[int, ...]  # offsets of the pieces of scratch memory, bytes


_known: dict[tuple[Any, ...], Known] = {}


def described(
    base: Any, arms: Any, weights: Any, seeds: Any, positions: Any, temperature: Any, top_k: Any, top_p: Any,
    min_p: Any, vocab_size: Any, bias: Any, return_logprobs: Any, top_logprobs: Any,
) -> tuple[tuple[Any, ...], list[int], tuple[Any, ...], tuple[Any, ...]] | None:  # fmt: skip
    """Return the signature of a call with these fields of SamplingArguments, and what varies between its launches.

    The result is (signature, addresses, weights, parameters). The addresses are those of the members, then of a bias.
    Weights and parameters are numbers, or addresses of tensors. None for a call that needs checks or conversions.
    """
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
    """Keep the kernels that a call launched. Triton's interpreter returns no kernels, and then nothing is kept."""
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
    """Return the result of a call that resembles an earlier one; None for other calls."""
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
    if bits % ALIGNED:  # no known allocator returns such an address
        return None
    parts = [begin + start for start in starts]
    members = tuple(addresses[: plan.members])
    bias = addresses[-1] if len(addresses) > plan.members else begin
    values = plan.arguments(members, weights, bias, parameters, parts, places)
    stream, hooks = driver.active.get_current_stream(device), knobs.runtime
    watched = getattr(hooks.launch_enter_hook, "calls", True) or getattr(hooks.launch_exit_hook, "calls", True)
    for (kernel, grid), each in zip(launches, values):
        if watched:  # someone, for example a profiler, has set a hook
            kernel[grid](*each, stream=stream)
        else:  # does the same as the line above, without the hooks' arguments, which take half of the time
            kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *each)
    del scratch  # later work on this stream may use the memory
    return tuple.__new__(GuidedSample, (*outputs, None, None, None, None)[:6])
