"""Calls ops for the fuzz (fuzz_layers.py), by the dispatch or by Triton launchers, on tensors at odd places in memory.

It also compares results with their references, within the tolerance of their dtype.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from stacked_products import stacked

from genarm_fast import kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Triton's interpreter truncates where a GPU rounds to bfloat16.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 8e-2, torch.float16: 8e-3}


def arm_logps(hidden: Any, weight: Any, labels: Any, *, triton: bool, **options: Any) -> Any:
    if not triton:
        return kernels.arm_logps(hidden, weight, labels, **options)
    from genarm_fast.kernels.arm_logps.triton import launch

    return launch(hidden, weight, labels, *(options[name] for name in ("bias", "logit_scale", "softcap"))).sum(-1)


def rms_norm(triton: bool, x: Any, weight: Any, eps: float, offset: float) -> Any:
    if triton:
        from genarm_fast.kernels.rms_norm.triton import launch

        return launch(x, weight, eps, offset)
    return kernels.rms_norm(x, weight, eps, offset=offset)


def add_rms_norm(triton: bool, *arguments: Any) -> Any:
    if triton:
        from genarm_fast.kernels.rms_norm.triton import run

        return run(*arguments)
    *plain, offset, b, index = arguments
    return kernels.add_rms_norm(*plain, offset=offset, lanes=lanes_of(b, index))


def silu_mul(triton: bool, gate: Any, up: Any) -> Any:
    if triton and gate.numel():  # the launcher does not take empty tensors
        from genarm_fast.kernels.gated_mul.triton import launch_silu_mul

        return launch_silu_mul(gate, up)
    return kernels.silu_mul(gate, up)


def gated_mul(triton: bool, y: Any, activation: str, b: Any, index: Any) -> Any:
    if triton:
        from genarm_fast.kernels.gated_mul.triton import launch

        return launch(y, activation, b, index)
    return kernels.gated_mul(y, activation=activation, lanes=lanes_of(b, index))


def rotary(triton: bool, *arguments: Any) -> Any:
    if triton:
        from genarm_fast.kernels.rotary.triton import launch

        return launch(*arguments, 1)
    return kernels.rotary(*arguments)


def rotary_append(triton: bool, *arguments: Any) -> Any:
    if triton:
        from genarm_fast.kernels.rotary_append.triton import launch

        return launch(*arguments)
    *plain, query_norm, key_norm, eps, bias, b, index = arguments
    norms = {"query_norm": query_norm, "key_norm": key_norm}
    return kernels.rotary_append(*plain, **norms, eps=eps, bias=bias, lanes=lanes_of(b, index))


def ragged_append(triton: bool, *arguments: Any) -> Any:
    if triton:
        from genarm_fast.kernels.ragged_attention.triton_append import append

        return append(*arguments)
    return kernels.ragged_append(*arguments)


def ragged_attention(triton: bool, *arguments: Any) -> Any:
    *plain, window, softcap = arguments
    if triton:
        from genarm_fast.kernels.ragged_attention.triton import attention

        return attention(*plain, 0.1, window, softcap, None)
    return kernels.ragged_attention(*plain, scale=0.1, window=window, softcap=softcap)


def lanes_of(b: Any, index: Any) -> Any:
    return None if b is None else kernels.Lanes(b, index)


def product(rng: random.Random, widths: Sequence[int], dtype: Any, rows: int = 3, block: int = 2) -> Any:
    """Return a stacked product y [rows, block, columns], (B, index) of its lanes, and the merged product in float64.

    Without lanes, (B, index) is (None, None)."""
    index = rng.choice([(), (), (-1, 1, 0)[:rows] if rows in (1, 3) else (-1, 1)])
    rank, seed = rng.randint(1, 17), rng.getrandbits(30)
    y, lanes, merged = stacked(widths, index, rows=rows * block, rank=rank, dtype=dtype, seed=seed)
    return y.view(rows, block, -1), lanes or (None, None), merged.view(rows, block, -1)


def called(
    rng: random.Random, triton: bool, op: Callable[..., Any], tensors: list[Any], dtype: Any, *rest: Any,
    in_place: Sequence[int] = (),
) -> Any:  # fmt: skip
    """Call an op on tensors at odd places in memory, for Triton between canaries; return its result and the tensors.

    in_place: indices of the tensors that the op writes. They never get the negative bit: launchers refuse it there.
    """

    def typed(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    tensors, rest = [typed(each) for each in tensors], tuple(map(typed, rest))
    if not triton:
        placed = [odd(rng, each, negated=i not in in_place) for i, each in enumerate(tensors)]
        return op(False, *placed, *rest), placed
    from interpreter import between_canaries, bfloat16_products

    with between_canaries() as canaries, bfloat16_products():
        placed = [odd(rng, each, canaries.embed, negated=i not in in_place) for i, each in enumerate(tensors)]
        extra = [canaries.embed(each) if isinstance(each, torch.Tensor) else each for each in rest]
        found = op(True, *placed, *extra)
    assert found is not None, f"{op.__name__} was not launched"
    return found, placed


def odd(rng: random.Random, tensor: Any, place: Callable[[Any], Any] | None = None, *, negated: bool = True) -> Any:
    """Return an equal tensor that begins at an odd place in memory, sometimes transposed or with the negative bit."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    place = place or (lambda each: at_an_odd_place(each, rng.randint(0, 3)))
    if rng.random() < 0.2 and tensor.ndim > 1:
        return place(tensor.transpose(0, 1).contiguous()).transpose(0, 1)
    # Only float32 and float16 tensors get the negative bit here.
    if negated and rng.random() < 0.1 and tensor.dtype in (torch.float32, torch.float16):
        return torch._neg_view(place(tensor.neg()))
    return place(tensor)


def map_odd(rng: random.Random, tensors: Sequence[Any]) -> list[Any]:
    return [odd(rng, each) for each in tensors]


def at_an_odd_place(tensor: Any, skipped: int) -> Any:
    memory = torch.empty(skipped + math.prod(tensor.shape), dtype=tensor.dtype)
    return memory[skipped:].view(tensor.shape).copy_(tensor)


def exact(dtype: Any, *tensors: Any) -> list[Any]:
    """Return the tensors rounded to `dtype`, as float64. Other values are returned as they are."""
    return [each.to(dtype).double() if isinstance(each, torch.Tensor) else each for each in tensors]


def close(found: Any, expected: Any, dtype: Any, factor: float = 1.0) -> None:
    tolerance = factor * TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def near(found: Any, expected: Any, tolerance: float = 0.05) -> None:
    """Compare products of many terms: errors may be a share `tolerance` of the largest expected number."""
    assert found.shape == expected.shape
    if found.numel():
        scale = 1 + float(expected.abs().amax())
        assert float((found.double() - expected).abs().amax()) < tolerance * scale
