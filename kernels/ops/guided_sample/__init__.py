"""guided_sample: draw tokens from the guided distribution, given the members' logits (maths: reference.py)."""

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
    arm_logits: Sequence[Tensor] | Tensor = (),  # m tensors [.., V], or one of m = 1; V and dtype may differ from base
    weights: Tensor | Sequence[float] | float = (),  # [m] or [R, m], or one number for every ARM
    *,
    temperature: Tensor | float = 1.0,  # scalar or [R]; 0 is greedy
    top_k: Tensor | int | None = None,  # None and 0 keep all tokens
    top_p: Tensor | float | None = None,  # None and 1 keep all tokens
    min_p: Tensor | float | None = None,  # None and 0 keep all tokens
    seeds: Tensor | int | None = None,  # int64, scalar or [R], see philox.seed_tensor; None draws random seeds
    positions: Tensor | int | None = None,  # int64, scalar, [R] or [R, q]: index of the token in the response
    generator: torch.Generator | None = None,  # draws the seeds; None: PyTorch's default generator
    vocab_size: int | None = None,  # tokens that count, from id 0 on; None: the width of the narrowest member
    logit_bias: Tensor | None = None,  # [V] or [R, V], added to the combined scores; -inf masks a token
    return_logprobs: bool = False,  # return the token's log-probability, and each member's of it
    top_logprobs: int = 0,  # return this many of the most probable tokens with their log-probabilities
) -> GuidedSample:
    """Draw one token for each position from the guided distribution: R rows of q positions, m ARMs, V tokens.

    Logits [V] are one row, and the result then has no axis for rows. A token is a function of its logits, seed and
    position. `seeds` make it reproducible, and need `positions`. Without `seeds`, `torch.manual_seed` or `generator`
    makes it reproducible.

    Runs in Triton on CUDA, ROCm and XPU, and in C++ on the CPU. `guided_sample_reference` serves where neither is
    available, for dtypes other than float32, bfloat16 and float16, and on a GPU for 65,536 rows or more. Among equally
    probable tokens `top_tokens` has those of the lowest ids; in Triton any of them.

    Raises:
        TypeError: logits that are not floating point, fractions where integers are expected, seeds without positions,
            seeds and a generator.
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
    """Whether the members and weights have the form that all implementations take. The check may take 0.2 µs a call."""
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

    It computes in float32, or completely in float64 for a base in float64.
    """
    *call, one = arranged(base_logits, arm_logits, weights, seeds, positions, generator)
    arguments = SamplingArguments(*call, **options)
    check(arguments)
    drawn = specification(arguments)
    return first(drawn) if one else drawn
