"""guided_sample on the CPU, by the C++ core (kernels/csrc) where it was built.

GENARM_FAST_ISA = avx512 | avx2 | baseline forces an instruction set; `none` turns the core off. One thread per row at
most, and only for calls that are worth starting threads: torch.get_num_threads() is the limit.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

core: Any = None
with suppress(ImportError):  # installed without a compiler
    core = import_module("._C", __package__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ELEMENTS_PER_THREAD = 1 << 19  # about 0.2 ms of work: a tenth of it is spent on starting a thread

forced = os.environ.get("GENARM_FAST_ISA")
if forced == "none":
    core = None
elif forced and core is not None:
    core.use(forced)


def guided_sample(
    base: Tensor,
    arms: Sequence[Tensor],
    weights: Tensor | Sequence,
    vocab_size: int,
    logit_bias: Tensor | None,
    return_logprobs: bool,
    top_logprobs: int,
    *,
    temperature: Tensor | float,
    top_k: Tensor | int,
    top_p: Tensor | float,
    min_p: Tensor | float,
    seeds: Tensor | int,
    positions: Tensor | int,
) -> tuple[Tensor, ...]:
    """The fields of GuidedSample that were asked for; arguments are checked by the caller."""
    shape = base.shape[:-1]
    rows, block = shape[0], shape[1] if len(shape) == 2 else 1
    alive = []  # converted copies must outlive the call

    def parameter(value: Tensor | float, dtype: torch.dtype) -> float | tuple[int, tuple[int, ...]]:
        if not isinstance(value, Tensor):
            return value
        alive.append(value.to("cpu", dtype))
        return alive[-1].data_ptr(), alive[-1].stride()

    members = []
    for logits in (base, *arms):
        if logits.stride(-1) != 1:
            logits = logits.contiguous()
            alive.append(logits)
        members.append((logits.data_ptr(), DTYPES[logits.dtype], logits.stride()))

    buffer = None
    if isinstance(weights, Tensor) or (len(weights) and isinstance(weights[0], (list, tuple))):
        weights = torch.as_tensor(weights, dtype=torch.float32, device="cpu").contiguous()
        weights_address, weights_stride = weights.data_ptr(), weights.stride(0) if weights.ndim == 2 else 0
    else:
        buffer = array("f", weights)
        weights_address, weights_stride = buffer.buffer_info()[0], 0
    bias_address = bias_stride = 0
    if logit_bias is not None:
        logit_bias = logit_bias.to("cpu", torch.float32).contiguous()
        bias_address, bias_stride = logit_bias.data_ptr(), logit_bias.stride(0) if logit_bias.ndim == 2 else 0

    outputs = [base.new_empty(shape, dtype=torch.int64), base.new_empty(shape, dtype=torch.int32)]
    if return_logprobs or top_logprobs:
        outputs += [base.new_empty(shape, dtype=torch.float32)]
        outputs += [base.new_empty((len(members), *shape), dtype=torch.float32)]
    if top_logprobs:
        outputs += [base.new_empty((*shape, top_logprobs), dtype=torch.int64)]
        outputs += [base.new_empty((*shape, top_logprobs), dtype=torch.float32)]
    elements = rows * block * vocab_size * len(members)
    core.guided_sample(
        rows,
        block,
        vocab_size,
        tuple(members),
        weights_address,
        weights_stride,
        bias_address,
        bias_stride,
        parameter(temperature, torch.float32),
        parameter(top_k, torch.int64),
        parameter(top_p, torch.float32),
        parameter(min_p, torch.float32),
        parameter(seeds, torch.int64),
        parameter(positions, torch.int64),
        top_logprobs,
        min(torch.get_num_threads(), elements // ELEMENTS_PER_THREAD),
        *[output.data_ptr() for output in outputs],
        *[0] * (6 - len(outputs)),
    )
    return tuple(outputs)
