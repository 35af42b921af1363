"""The ops as torch custom ops: torch.compile and torch.export see one node each. (The small ones, rms_norm, rotary and
silu_mul, are left to the compiler, which fuses them with their neighbours.)

Only code that is being compiled goes through them: a call of guided_sample takes 4 µs directly, 14 µs through the op,
and 15 µs more still through an op made by `torch.library.custom_op`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import check_arguments
from .philox import seed_tensor

library = torch.library.Library("genarm_fast", "DEF")
library.define(
    "guided_sample(Tensor base_logits, Tensor[] arm_logits, Tensor weights, Tensor temperature, Tensor top_k, "
    "Tensor top_p, Tensor min_p, Tensor seeds, Tensor positions, SymInt vocab_size, Tensor? logit_bias, "
    "bool return_logprobs, int top_logprobs) -> Tensor[]"
)
library.define(
    "arm_logps(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float scale, float? softcap) -> Tensor"
)
library.define(
    "arm_logps_backward(Tensor grad, bool[] wanted, Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, "
    "float scale, float? softcap) -> Tensor[]"
)
library.define(
    "settle(Tensor targets, Tensor drafts, Tensor lengths, Tensor limits, Tensor finished, Tensor stop_ids, "
    "Tensor? draft_counts) -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "small_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] a, Tensor[] b, float[] scales, SymInt[] spans) "
    "-> Tensor"
)
library.define(
    "ragged_attention(Tensor query, Tensor keys, Tensor values, Tensor slots, Tensor positions, float scale, "
    "SymInt? window, float? softcap, SymInt? limit) -> Tensor"
)
library.define(
    "ragged_append(Tensor(a!) keys, Tensor(b!) values, Tensor new_keys, Tensor new_values, Tensor slots, "
    "Tensor positions) -> ()"
)
DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seeds": torch.int64,
    "positions": torch.int64,
}


def guided_sample(
    base: Tensor,
    arms: Sequence[Tensor],
    weights: Tensor | Sequence,
    vocab_size: int | None,
    logit_bias: Tensor | None,
    return_logprobs: bool,
    top_logprobs: int,
    **parameters: Any,
) -> list[Tensor]:
    """The fields of GuidedSample that were asked for, from the op; numbers become tensors."""
    vocab_size = check_arguments(base, arms, weights, vocab_size, logit_bias, top_logprobs, **parameters)
    if isinstance(parameters["seeds"], int):
        parameters["seeds"] = seed_tensor([parameters["seeds"]], base.device)[0]
    for name, value in parameters.items():
        if not isinstance(value, Tensor):
            parameters[name] = torch.full((), value, dtype=DTYPES[name], device=base.device)
    return torch.ops.genarm_fast.guided_sample(
        base,
        list(arms),
        torch.as_tensor(weights, dtype=torch.float32, device=base.device),
        *(parameters[name] for name in DTYPES),
        vocab_size,
        logit_bias,
        return_logprobs,
        top_logprobs,
    )


def _run_guided_sample(base: Tensor, arms: list[Tensor], weights: Tensor, *rest: Any) -> list[Tensor]:
    from .guided_sample import guided_sample as run  # which imports this file

    *parameters, vocab_size, logit_bias, return_logprobs, top_logprobs = rest
    fields = run(
        base,
        arms,
        weights,
        vocab_size=vocab_size,
        logit_bias=logit_bias,
        return_logprobs=return_logprobs,
        top_logprobs=top_logprobs,
        **dict(zip(DTYPES, parameters)),
    )
    return [field for field in fields if field is not None]


def _fake_guided_sample(base: Tensor, arms: list[Tensor], weights: Tensor, *rest: Any) -> list[Tensor]:
    shape, (*_, return_logprobs, top) = base.shape[:-1], rest
    sizes: list[tuple[tuple[int, ...], torch.dtype]] = [(shape, torch.int64), (shape, torch.int32)]
    if return_logprobs or top > 0:
        sizes += [(shape, torch.float32), ((1 + len(arms), *shape), torch.float32)]
    if top > 0:
        sizes += [((*shape, top), torch.int64), ((*shape, top), torch.float32)]
    return [base.new_empty(size, dtype=dtype) for size, dtype in sizes]


def _run_settle(targets: Tensor, drafts: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from .settle import settle as run  # which imports this file

    names = ("lengths", "limits", "finished", "stop_ids", "draft_counts")
    return tuple(run(targets, drafts, **dict(zip(names, rest))))


def _fake_settle(targets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    rows = targets.shape[:1]
    return (*(targets.new_empty(rows) for _ in range(3)), targets.new_empty(rows, dtype=torch.bool))


def small_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, loras: Sequence[tuple[int, int, Tensor, Tensor, float]]
) -> Tensor:
    """small_linear from the op."""
    spans = [row for lora in loras for row in lora[:2]]
    a, b, scales = ([lora[i] for lora in loras] for i in (2, 3, 4))
    return torch.ops.genarm_fast.small_linear(x, weight, bias, a, b, scales, spans)


def _run_small_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    spans: list[int],
) -> Tensor:
    from .small_linear import small_linear as run  # which imports this file

    return run(x, weight, bias, loras=list(zip(spans[::2], spans[1::2], a, b, scales)))


def _fake_small_linear(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _run_ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    limit: int | None,
) -> Tensor:
    from .ragged_attention import ragged_attention as run  # which imports this file

    return run(query, keys, values, slots, positions, scale=scale, window=window, softcap=softcap, limit=limit)


def _fake_ragged_attention(query: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    rows, heads, block, _width = query.shape
    return query.new_empty((rows, block, heads, values.shape[3]))


def _run_ragged_append(*tensors: Tensor) -> None:
    from .ragged_attention import ragged_append as run  # which imports this file

    run(*tensors)


def _run_arm_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    from .arm_logps import arm_logps as run  # which imports this file

    return run(hidden, weight, labels, bias=bias, logit_scale=scale, softcap=softcap, return_tokens=True)


def _fake_arm_logps(hidden: Tensor, weight: Tensor, labels: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(labels.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))


def _run_arm_logps_backward(
    grad: Tensor, wanted: list[bool], hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any
) -> list[Tensor]:
    """The forward pass once more, this time for its gradients: a compiled one does not know which are wanted."""
    inputs = [
        None if tensor is None else tensor.detach().requires_grad_(needed)
        for tensor, needed in zip((hidden, weight, bias), wanted)
    ]
    with torch.enable_grad():
        tokens = _run_arm_logps(inputs[0], inputs[1], labels, inputs[2], *rest)  # type: ignore[arg-type]
    return list(torch.autograd.grad(tokens, [x for x in inputs if x is not None and x.requires_grad], grad))


def _fake_arm_logps_backward(
    grad: Tensor, wanted: list[bool], hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *_: Any
) -> list[Tensor]:
    return [torch.empty_like(x) for x, needed in zip((hidden, weight, bias), wanted) if needed and x is not None]


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    hidden, weight, labels, bias, *ctx.rest = inputs
    ctx.save_for_backward(hidden, weight, labels, bias)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[3]]  # of hidden, weight, bias
    found = iter(torch.ops.genarm_fast.arm_logps_backward(grad, wanted, *ctx.saved_tensors, *ctx.rest))
    hidden, weight, bias = (next(found) if needed else None for needed in wanted)
    return hidden, weight, None, bias, None, None


for name, run, fake in (
    ("guided_sample", _run_guided_sample, _fake_guided_sample),
    ("settle", _run_settle, _fake_settle),
    ("small_linear", _run_small_linear, _fake_small_linear),
    ("ragged_attention", _run_ragged_attention, _fake_ragged_attention),
    ("ragged_append", _run_ragged_append, lambda *_: None),
    ("arm_logps", _run_arm_logps, _fake_arm_logps),
    ("arm_logps_backward", _run_arm_logps_backward, _fake_arm_logps_backward),
):
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"genarm_fast::{name}", fake, lib=library)
torch.library.register_autograd("genarm_fast::arm_logps", _differentiate, setup_context=_save_for_backward, lib=library)

settle = torch.ops.genarm_fast.settle.default
ragged_attention = torch.ops.genarm_fast.ragged_attention.default
ragged_append = torch.ops.genarm_fast.ragged_append.default
arm_logps = torch.ops.genarm_fast.arm_logps.default
