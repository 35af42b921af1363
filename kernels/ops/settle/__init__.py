"""settle: accept draft tokens on the device (maths: reference.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._dispatch import checked_reference, dispatcher
from . import cpu, custom_op
from .arguments import check
from .reference import Settled, specification


def _on_gpu(*arguments: Any) -> Settled:
    from . import triton  # the package triton takes half a second to import, and is not on every platform

    return triton.launch(*arguments)


_run = dispatcher(specification, check=check, cpu=cpu.run, triton=_on_gpu, custom_op=custom_op.call)
custom_op.implement(_run)
settle_reference = checked_reference(check, specification)


def settle(
    targets: Tensor,  # int64 [R, K + 1], tokens that guided_sample drew for the draft positions and one more
    drafts: Tensor,  # int64 [R, K]
    *,
    lengths: Tensor,  # int64 [R], tokens of the response so far
    limits: Tensor,  # int64 [R], most tokens of the response
    finished: Tensor,  # bool [R], rows that get no more tokens
    stop_ids: Tensor,  # int64 [S] or [R, S], tokens that end a row; padded with -1
    draft_counts: Tensor | None = None,  # int64 [R], drafts of each row; None: K for all rows
) -> Settled:
    """Settle each row's targets up to the first one that differs from its draft, or that has no draft.

    So a row gets 1 to K + 1 tokens, fewer if a stop token or its limit comes first, and none if it was finished.

    Nothing is read back to the host. The op is one Triton launch on CUDA, ROCm and XPU. It runs in C++ on the CPU, or
    in `settle_reference` without the C++ core.

    Raises:
        TypeError: ids or lengths that are not integers, or `finished` that is not bool.
        ValueError: shapes that do not fit together, or tensors on other devices than `targets`.
    """
    return _run(targets, drafts, lengths, limits, finished, stop_ids, draft_counts)
