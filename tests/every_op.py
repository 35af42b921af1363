"""Every op of genarm_fast.kernels as a function of tensors alone, on the CPU or by its Triton launcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from genarm_fast.kernels import (
    Lanes,
    Lora,
    QuantWeight,
    SiblingLinears,
    SmallLinear,
    add_rms_norm,
    arm_logps,
    gated_mul,
    guided_sample,
    ngram_lookup,
    quant_linear,
    ragged_append,
    ragged_attention,
    rms_norm,
    rotary,
    rotary_append,
    settle,
    silu_mul,
    small_linear,
)


class Op(NamedTuple):
    """An op, as functions of its floating-point tensors followed by its integer tensors.

    run: the op on the CPU. launch: its Triton launcher, None without a kernel. rows: indices of the floating-point
    tensors whose first dimension counts rows. writes: indices of the tensors that the op changes.
    """

    run: Callable[..., Any]
    shapes: list[tuple[int, ...]]
    integers: list[Any]
    rows: list[int]
    launch: Callable[..., Any] | None = None
    writes: tuple[int, ...] = ()


def sample(base, arm, weights, temperature, top_p, min_p, bias, seeds, positions, top_k):
    filters = {"top_p": top_p, "min_p": min_p, "top_k": top_k, "logit_bias": bias}
    options = {"temperature": temperature, "seeds": seeds, "positions": positions, "top_logprobs": 2, **filters}
    return tuple(guided_sample(base, (arm,), weights, **options))


def launch_sample(base, arm, weights, temperature, top_p, min_p, bias, seeds, positions, top_k):
    from genarm_fast.kernels.guided_sample.arguments import SamplingArguments, check
    from genarm_fast.kernels.guided_sample.triton import launch

    filters = {"top_p": top_p, "min_p": min_p, "top_k": top_k, "logit_bias": bias}
    options = {"temperature": temperature, "seeds": seeds, "positions": positions, "top_logprobs": 2, **filters}
    arguments = SamplingArguments(base, (arm,), weights, return_logprobs=True, **options)
    check(arguments)
    return tuple(launch(arguments))


def settled(targets, drafts, lengths, limits, stop_ids, counts):
    finished = torch.zeros(len(lengths), dtype=torch.bool)
    rest = {"lengths": lengths, "limits": limits, "finished": finished, "stop_ids": stop_ids, "draft_counts": counts}
    return tuple(settle(targets, drafts, **rest))


def launch_settled(targets, drafts, lengths, limits, stop_ids, counts):
    from genarm_fast.kernels.settle.triton import launch

    return tuple(launch(targets, drafts, lengths, limits, lengths < lengths, stop_ids, counts))


def launch_lookup(tokens, lengths):
    from genarm_fast.kernels.ngram_lookup.triton import launch

    return launch(tokens, lengths, 3, 4, 2)


def append(keys, values, new_keys, new_values, slots, positions):
    ragged_append(keys, values, new_keys, new_values, slots, positions)
    return keys, values


def launch_append(*arguments):
    from genarm_fast.kernels.ragged_attention.triton_append import append as launch

    assert launch(*arguments)
    return arguments[:2]


def attend(query, keys, values, slots, positions):
    return ragged_attention(query, keys, values, slots, positions, scale=0.5)


def launch_attend(*arguments):
    from genarm_fast.kernels.ragged_attention.triton import attention

    return attention(*arguments, 0.5, None, None, None)


def linear(x, weight, bias, a, b):
    rows = len(x)
    whole = SmallLinear(weight, bias, [Lora(a, b, 0.5)])
    one = small_linear(x, weight, bias, loras=[(0, min(1, rows), a, b, 0.5)])
    return whole(x, [(0, min(1, rows), 0)]), one, *SiblingLinears([whole])(x, [()])


def quantized(x, a, b, codes):
    weight = QuantWeight(codes, torch.full((len(codes), 1), 0.25, dtype=torch.float16))
    return quant_linear(x.bfloat16(), weight, loras=[(0, min(1, len(x)), a.bfloat16(), b.bfloat16(), 0.5)]).float()


def launch_norm(x, weight):
    from genarm_fast.kernels.rms_norm.triton import launch

    return launch(x, weight, 1e-5, 1.0)


def launch_add(hidden, y, weight, b, adapters):
    from genarm_fast.kernels.rms_norm.triton import run

    return run(hidden, y, weight, 1e-5, 0.0, b, adapters)


def launch_gates(y, b, adapters):
    from genarm_fast.kernels.gated_mul.triton import launch

    return launch(y, "silu", b, adapters)


def launch_silu(gate, up):
    from genarm_fast.kernels.gated_mul.triton import launch_silu_mul

    return launch_silu_mul(gate, up) if gate.numel() else silu_mul(gate, up)


def launch_rotary(*arguments):
    from genarm_fast.kernels.rotary.triton import launch

    return launch(*arguments, 1)


def rotate_and_append(y, cos, sin, keys, values, query_norm, key_norm, bias, b, slots, positions, adapters):
    norms = {"query_norm": query_norm, "key_norm": key_norm}
    queries = rotary_append(y, cos, sin, keys, values, slots, positions, **norms, bias=bias, lanes=Lanes(b, adapters))
    return queries, keys, values


def launch_rotate_and_append(y, cos, sin, keys, values, query_norm, key_norm, bias, b, slots, positions, adapters):
    from genarm_fast.kernels.rotary_append.triton import launch

    queries = launch(y, cos, sin, keys, values, slots, positions, query_norm, key_norm, 1e-6, bias, b, adapters)
    return queries, keys, values


def launch_logps(hidden, weight, bias, labels):
    """Run the launcher's part between its two host reads, which refuse bad labels, and the final sum."""
    from genarm_fast.kernels.arm_logps.streamed import target_logps
    from genarm_fast.kernels.arm_logps.tiles import Layer
    from genarm_fast.kernels.arm_logps.triton import TILES

    labelled = labels != -100
    found = target_logps(hidden[labelled], weight, labels[labelled], Layer(bias, 1.0, None), TILES)
    return torch.zeros(labels.shape).masked_scatter(labelled, found).sum(-1)


CACHE, PLACES = (2, 2, 5, 8), [[1, 0], [[2, 3], [0, 4]]]
OPS = {
    "guided_sample": Op(
        sample, [(3, 50), (3, 51), (3, 1), (3,), (3,), (3,), (3, 50)], [[1, 2, 3], [0, 5, 6], [0, 3, 60]],
        [0, 1, 2, 3, 4, 5, 6], launch_sample,
    ),
    "settle": Op(
        settled, [], [[[3, 4], [5, 6]], [[3], [4]], [0, 7], [9, 8], [1, -1], [1, 0]], [], launch_settled
    ),
    "ngram_lookup": Op(
        lambda tokens, lengths: ngram_lookup(tokens, lengths, 3), [], [[[1, 2, 3, 1, 2], [4, 4, 4, 5, 6]], [5, 3]], [],
        launch_lookup,
    ),
    "ragged_attention": Op(attend, [(2, 4, 2, 8), CACHE, CACHE], PLACES, [0], launch_attend),
    "ragged_append": Op(append, [CACHE, CACHE, (2, 2, 2, 8), (2, 2, 2, 8)], PLACES, [2, 3], launch_append, (0, 1)),
    "rms_norm": Op(lambda x, weight: rms_norm(x, weight, 1e-5, offset=1.0), [(2, 16), (16,)], [], [0], launch_norm),
    "add_rms_norm": Op(
        lambda hidden, y, weight, b, adapters: add_rms_norm(hidden, y, weight, 1e-5, lanes=Lanes(b, adapters)),
        [(2, 16), (2, 22), (16,), (2, 3, 16)], [[1, -1]], [0, 1], launch_add,
    ),
    "rotary": Op(rotary, [(2, 2, 2, 8), (2, 1, 2, 8), (1, 2, 8), (1, 2, 8)], [], [0, 1], launch_rotary),
    "rotary_append": Op(
        rotate_and_append,
        [(2, 2, 76), (1, 2, 8), (1, 2, 8), CACHE, CACHE, (8,), (8,), (64,), (2, 2, 64)], [*PLACES, [1, -1]],
        [0], launch_rotate_and_append, (3, 4),
    ),
    "silu_mul": Op(silu_mul, [(2, 16), (2, 16)], [], [0, 1], launch_silu),
    "gated_mul": Op(
        lambda y, b, adapters: gated_mul(y, lanes=Lanes(b, adapters)), [(2, 44), (2, 3, 32)], [[1, -1]], [0],
        launch_gates,
    ),
    "small_linear": Op(linear, [(2, 32), (16, 32), (16,), (2, 32), (2, 16)], [], [0]),
    "quant_linear": Op(quantized, [(2, 32), (2, 32), (2, 16)], [], [0]),
    "arm_logps": Op(
        lambda hidden, weight, bias, labels: arm_logps(hidden, weight, labels, bias=bias), [(1, 2, 8), (9, 8), (9,)],
        [[[1, -100]]], [0], launch_logps,
    ),
}  # fmt: skip


def tensors_of(name: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the op's floating-point tensors, with values between 0 and 1, and its integer tensors."""
    generator = torch.Generator().manual_seed(0)
    floats = [torch.rand(shape, generator=generator).to(dtype) for shape in OPS[name].shapes]
    integers = [torch.tensor(values) for values in OPS[name].integers]
    if name == "quant_linear":
        integers = [torch.arange(16 * 32).view(16, 32).remainder(251).sub(125).to(torch.int8)]
    return floats, integers


def called(run: Callable[..., Any], floats: list[torch.Tensor], integers: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():  # inference mode under a dispatch mode loses the negative bit in `to` (torch 2.13)
        out = run(*floats, *integers)
    return [out] if isinstance(out, torch.Tensor) else list(out)


def without_rows(name: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the tensors of `tensors_of` for no row at all. Lanes share the rows evenly, so one adapter index is
    left."""
    floats, integers = tensors_of(name, dtype)
    floats = [each[:0] if i in OPS[name].rows else each for i, each in enumerate(floats)]
    if name == "quant_linear":
        return floats, integers
    kept = {"settle": (4,)}.get(name, ())
    return floats, [
        each if i in kept else each[:1] if is_adapters(name, i) else each[:0] for i, each in enumerate(integers)
    ]


def is_adapters(name: str, index: int) -> bool:
    return (name, index) in {("add_rms_norm", 0), ("gated_mul", 0), ("rotary_append", 2)}


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """Return an equal tensor with the same strides whose memory holds the negated values."""
    out = torch._neg_view(tensor.neg())
    assert out.is_neg()
    assert torch.equal(out, tensor)
    assert out.stride() == tensor.stride()
    return out


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that begins one element after an address that 64 divides."""
    memory = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)
    skipped = (-memory.data_ptr() % 64) // memory.element_size() + 1
    out = memory[skipped : skipped + tensor.numel()].view(tensor.shape).copy_(tensor)
    assert out.data_ptr() % 64 == tensor.element_size()
    return out
