"""ngram_lookup: draft tokens by looking up a text's ending in the text itself, on the device (maths: reference.py)."""

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
    tokens: Tensor,  # int64 [R, H], prompt and response of each row; tokens beyond its length are not read
    lengths: Tensor,  # int64 [R], tokens in each row; a length above H counts as H
    k: int,  # drafts for each row
    *,
    max_n: int = 4,  # longest ending that is looked up, tokens
    min_n: int = 2,  # shortest ending that is looked up, tokens
) -> Tensor:
    """Return k drafts for each row, int64 [R, k]: the tokens that followed the row's ending where it stood before.

    The longest ending of max_n to min_n tokens that stands earlier in the row counts, at its last earlier place. Rows
    without one have drafts -1. Nothing is read back to the host. The op is one Triton launch on CUDA, ROCm and XPU.
    Other calls run in PyTorch, which takes time and memory proportional to R · H.

    Raises:
        TypeError: tokens or lengths that are not integers.
        ValueError: shapes that do not fit together, k < 0, or not 1 <= min_n <= max_n.
    """
    return _run(tokens, lengths, k, max_n, min_n)
