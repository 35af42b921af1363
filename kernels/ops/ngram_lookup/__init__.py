"""ngram_lookup: drafts that a text itself gives, on the device (maths: reference.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _custom_op
from .._dispatch import checked_reference, dispatcher
from . import custom_op
from .arguments import check
from .reference import specification


def _on_gpu(*arguments: Any) -> Tensor:
    from . import triton  # the package triton takes half a second to import, and is not on every platform

    return triton.launch(*arguments)


_run = dispatcher(specification, check=check, triton=_on_gpu, custom_op=custom_op.call)
_custom_op.implement(custom_op.call, _run)
ngram_lookup_reference = checked_reference(check, specification)


def ngram_lookup(
    tokens: Tensor,  # int64 [R, H], prompt and response of each row; what lies behind its length is not looked at
    lengths: Tensor,  # int64 [R]; more than H counts as H
    k: int,
    *,
    max_n: int = 4,
    min_n: int = 2,
) -> Tensor:
    """What followed the last tokens of each row when they stood in it before → int64 [R, k], -1 where they did not.

    Endings of max_n to min_n tokens are looked up, the longest first. Reads nothing back: one Triton launch on CUDA,
    ROCm and XPU; otherwise PyTorch, in time and memory in proportion to R · H.

    Raises:
        TypeError: tokens or lengths that are not integers.
        ValueError: shapes that do not fit together, k < 0, or not 1 <= min_n <= max_n.
    """
    return _run(tokens, lengths, k, max_n, min_n)
