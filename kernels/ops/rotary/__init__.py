"""rotary: rotary position embedding of queries and keys (maths: reference.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._dispatch import dispatcher
from . import cpu
from .reference import rotary_reference


def _on_gpu(*arguments: Any) -> tuple[Tensor, Tensor] | None:
    from . import triton  # the package triton takes half a second to import, and is not on every platform

    return triton.launch(*arguments)


_run = dispatcher(rotary_reference, cpu=cpu.run, triton=_on_gpu, differentiable=4)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """query [N, Hq, q, D], key [N, Hk, q, D], cos and sin [N or 1, q, D] → both, rotated.

    Takes the place of transformers' `apply_rotary_pos_emb`, whose bits it gives. In C++ on the CPU for float32 or
    bfloat16 tensors of one dtype, contiguous in D, that need no gradient; in Triton on CUDA, ROCm and XPU, for float16
    and any strides too. Otherwise, and where torch.compile traces it (to fuse it with its neighbours),
    `rotary_reference`.
    """
    return _run(query, key, cos, sin, unsqueeze_dim)
