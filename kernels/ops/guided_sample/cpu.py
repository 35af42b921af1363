"""guided_sample in C++ on the CPU (kernels/csrc/guided_sample)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from .arguments import DTYPES, SamplingArguments
from .reference import GuidedSample


def run(*arguments: Any) -> GuidedSample | None:
    """Take the fields of SamplingArguments by position and return the result.

    None for arguments that have to be converted or refused.
    """
    fields = _native.core.guided_sample(*arguments)
    return None if fields is None else tuple.__new__(GuidedSample, fields)  # takes half of the time of _make


def convert(arguments: SamplingArguments) -> SamplingArguments | None:
    """Return checked arguments in the form that `run` takes.

    None for logits that are not on the CPU, or of dtypes that the core does not read.
    """
    members = (arguments.base_logits, *arguments.arm_logits)
    if not all(logits.is_cpu and logits.dtype in _native.DTYPES for logits in members):
        return None

    def parameter(name: str) -> Any:
        value, dtype = getattr(arguments, name), DTYPES[name]
        if isinstance(value, Tensor):
            return _native.plain(value, dtype)
        if value is None:
            return None
        return float(value) if dtype.is_floating_point else int(value)  # converts numpy's numbers and bools

    base, *arms = map(_native.plain, members)
    bias = arguments.logit_bias
    return SamplingArguments(
        base,
        arms,
        _native.plain(torch.as_tensor(arguments.weights, dtype=torch.float32, device="cpu")),
        **{name: parameter(name) for name in DTYPES},
        vocab_size=int(arguments.vocabulary),
        logit_bias=None if bias is None else _native.plain(bias, torch.float32),
        return_logprobs=arguments.return_logprobs,
        top_logprobs=int(arguments.top_logprobs),
    )
