"""guided_sample: draw tokens from the guided distribution, straight from the members' logits (maths: reference.py)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._dispatch import dispatcher
from . import cpu, custom_op
from .arguments import SamplingArguments, check, unpacked
from .natural import arranged, first
from .reference import GuidedSample, specification


def _on_gpu(*arguments: Any) -> GuidedSample | None:
    from . import triton, triton_known  # the package triton takes half a second to import, and is not on every platform

    return triton.launch(SamplingArguments(*arguments), triton_known.remember)


def _known_on_gpu(*arguments: Any) -> GuidedSample | None:
    module = sys.modules.get(f"{__name__}.triton_known")  # an import statement would take 2 µs
    return None if module is None else module.known(*arguments)


_run = dispatcher(
    unpacked(specification),
    check=unpacked(check),
    cpu=cpu.run,
    convert=unpacked(cpu.convert),
    triton=_on_gpu,
    known=_known_on_gpu,
    custom_op=unpacked(custom_op.call),
)
custom_op.implement(_run)


def guided_sample(
    base_logits: Tensor,  # [V], [R, V] or [R, q, V], any float dtype
    arm_logits: Sequence[Tensor] | Tensor = (),  # m tensors alike, or one; widths and dtypes may differ
    weights: Tensor | Sequence[float] | float = (),  # [m] or [R, m], or a number for every ARM
    *,
    temperature: Tensor | float = 1.0,  # scalar or [R]; 0 is greedy
    top_k: Tensor | int | None = None,  # None and 0 keep all tokens
    top_p: Tensor | float | None = None,  # None and 1 keep all tokens
    min_p: Tensor | float | None = None,  # None and 0 keep all tokens
    seeds: Tensor | int | None = None,  # int64, scalar or [R], see philox.seed_tensor; None draws them
    positions: Tensor | int | None = None,  # int64, scalar, [R] or [R, q]: index of the token in the response
    generator: torch.Generator | None = None,  # what seeds are drawn from; None: PyTorch's own
    vocab_size: int | None = None,
    logit_bias: Tensor | None = None,  # [V] or [R, V], added to the combined scores; -inf masks a token
    return_logprobs: bool = False,
    top_logprobs: int = 0,
) -> GuidedSample:
    """Draw one token per position from the guided distribution.

    Only the first `vocab_size` tokens count (default: the narrowest member). Parameters are scalars or [R] tensors.
    Seeds make a token reproducible, and need `positions`; without any, `torch.manual_seed` does. Of logits [V] without
    a row's axis the result has none either.

    Runs in Triton on CUDA, ROCm and XPU, in C++ on the CPU, and in `guided_sample_reference` where neither is there or
    for other dtypes than float32, bfloat16 and float16; on a GPU also for 65,536 rows and more. Among equals,
    `top_tokens` has the lowest ids (Triton: any).

    Raises:
        TypeError: logits that are not floating point, fractions where integers are expected, seeds without positions.
        ValueError: shapes that do not fit together, a vocab_size wider than a member, a number out of its range.
    """
    one = False
    if seeds is None or positions is None or generator is not None or not _plain(base_logits, arm_logits, weights):
        call = arranged(base_logits, arm_logits, weights, seeds, positions, generator)
        base_logits, arm_logits, weights, seeds, positions, one = call
    drawn = _run(
        base_logits,
        arm_logits,
        weights,
        seeds,
        positions,
        temperature,
        top_k,
        top_p,
        min_p,
        vocab_size,
        logit_bias,
        return_logprobs,
        top_logprobs,
    )
    return first(drawn) if one else drawn


def _plain(base: Any, arms: Any, weights: Any) -> bool:
    """Whether nothing has to be arranged, in the 0.2 µs that a check at each call may take."""
    arms_listed = type(arms) is tuple or type(arms) is list
    return arms_listed and (type(weights) is list or getattr(weights, "ndim", 0) > 0) and getattr(base, "ndim", 0) > 1


def guided_sample_reference(
    base_logits: Tensor,
    arm_logits: Sequence[Tensor] | Tensor = (),
    weights: Tensor | Sequence[float] | float = (),
    *,
    seeds: Tensor | int | None = None,
    positions: Tensor | int | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> GuidedSample:
    """The specification of `guided_sample`, in plain PyTorch, with the same arguments.

    It computes in float32, or in float64 throughout for a base in float64.
    """
    *call, one = arranged(base_logits, arm_logits, weights, seeds, positions, generator)
    arguments = SamplingArguments(*call, **options)
    check(arguments)
    drawn = specification(arguments)
    return first(drawn) if one else drawn
