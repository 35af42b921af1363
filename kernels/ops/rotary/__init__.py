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
    """Return the rotated query [N, Hq, q, D] and key [N, Hk, q, D], for cos and sin [N or 1, q, D].

    Replaces transformers' `apply_rotary_pos_emb`, and gives the same bits. `unsqueeze_dim` is the axis of heads; only 1
    runs in C++ and Triton.

    Tensors of one dtype that need no gradient run in C++ on the CPU, if they are float32 or bfloat16 and contiguous in
    D. On CUDA, ROCm and XPU they run in Triton, in float16 too, with any strides. `rotary_reference` serves other
    calls, and calls that torch.compile traces, so that the compiler can fuse it with its neighbours.
    """
    return _run(query, key, cos, sin, unsqueeze_dim)
