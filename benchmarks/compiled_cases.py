"""The launches that compiled_kernels.py compiles: each binds the kernels of an op to tensors of typical shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from genarm_fast.kernels.guided_sample.arguments import SamplingArguments
from genarm_fast.kernels.guided_sample.triton import launch as launch_sample
from genarm_fast.kernels.ragged_attention import triton as attention_kernels
from genarm_fast.kernels.settle.triton import launch as launch_settle

BF16 = torch.bfloat16


def sample(
    *, arms: int = 1, vocab: int = 128256, dtype: torch.dtype = BF16, logit_bias: bool = False, **options: Any
) -> None:
    """One launch of guided_sample, with rows whose start is 16-byte aligned wherever V allows."""
    members = [torch.zeros(2, vocab, dtype=dtype) for _ in range(arms + 1)]
    row = torch.zeros(2, dtype=torch.int64)
    bias = torch.zeros(vocab) if logit_bias else None
    arguments = SamplingArguments(members[0], members[1:], [1.0] * arms, row, row, logit_bias=bias, **options)
    launch_sample(arguments)


def settle(drafts: int) -> None:
    rows = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
    launch_settle(
        torch.zeros(2, drafts + 1, dtype=torch.int64),
        torch.zeros(2, drafts, dtype=torch.int64),
        lengths=rows[0],
        limits=rows[1],
        finished=torch.zeros(2, dtype=torch.bool),
        stop_ids=torch.zeros(2, 4, dtype=torch.int64),
        draft_counts=torch.zeros(2, dtype=torch.int64),
    )


def attend(
    heads: tuple[int, int] = (32, 8),
    block: int = 1,
    widths: tuple[int, int] = (128, 128),
    dtype: torch.dtype = BF16,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """One launch of ragged_attention, by default with the heads of Llama-3-8B, and of ragged_append."""
    query = torch.zeros(2, block, heads[0], widths[0], dtype=dtype).transpose(1, 2)
    keys, values = (torch.zeros(2, heads[1], 4096, width, dtype=dtype) for width in widths)
    slots, positions = torch.zeros(2, dtype=torch.int64), torch.zeros(2, block, dtype=torch.int64)
    attention_kernels.attention(query, keys, values, slots, positions, widths[0] ** -0.5, window, softcap, None)
    if block == 1:
        attention_kernels.append(keys, values, keys[:, :, :1], values[:, :, :1], slots, positions)


CASES: dict[str, Callable[[], None]] = {
    "base only": partial(sample, arms=0),
    "1 ARM": sample,
    "1 ARM, log-probs": partial(sample, return_logprobs=True),
    "1 ARM, float32": partial(sample, dtype=torch.float32),
    "1 ARM, V = 50257": partial(sample, vocab=50257),
    "3 ARMs, log-probs, bias": partial(sample, arms=3, return_logprobs=True, logit_bias=True),
    "1 ARM, filters, top-5": partial(sample, top_k=50, top_p=0.9, min_p=0.01, top_logprobs=5),
    "5 drafts": partial(settle, 5),
    "8B": attend,
    "8B, q = 4": partial(attend, block=4),
    "8B, q = 16": partial(attend, block=16),
    "8B, q = 512": partial(attend, block=512),
    "8B, float32": partial(attend, dtype=torch.float32),
    "8B, float32, q = 16": partial(attend, block=16, dtype=torch.float32),
    "8B, float32, q = 512": partial(attend, block=512, dtype=torch.float32),
    "D = 80, float16": partial(attend, (32, 32), widths=(80, 80), dtype=torch.float16),
    "D = 96, Dv = 64, q = 5": partial(attend, (32, 32), 5, (96, 64)),
    "D = 64, window, q = 512": partial(attend, (14, 2), 512, (64, 64), window=1024),
    "D = 256, window, softcap, q = 5": partial(attend, (8, 4), 5, (256, 256), window=1024, softcap=50.0),
    "D = 256, window, softcap, q = 512": partial(attend, (8, 4), 512, (256, 256), window=1024, softcap=50.0),
}
