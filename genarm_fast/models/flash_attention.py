"""Attention over our cache by the package flash-attn, for models loaded with attn_implementation="flash_attention_2".

flash-attn reads no entry beyond a row's position, needs no mask, and splits long rows over a GPU. It has not run on a
GPU yet: tests compare the arguments of the call with a stand-in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from genarm_fast.models.attention import UNSUPPORTED, attend
from genarm_fast.models.forward_context import current_positions

IMPLEMENTATION = "genarm_fast_flash"
DTYPES = (torch.float16, torch.bfloat16)


def attend_flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute `attend` by flash-attn. Dtypes and devices that flash-attn does not take go to `attend` itself."""
    if not query.is_cuda or query.dtype not in DTYPES:
        return attend(module, query, key, value, attention_mask, scaling, sliding_window, softcap, **kwargs)
    if attention_mask is not None or any(kwargs.get(name) is not None for name in UNSUPPORTED):
        raise NotImplementedError(f"{type(module).__name__} asks for more than causal attention")
    from flash_attn import flash_attn_with_kvcache

    where = current_positions(query.device)
    # The tokens of a row are consecutive, so a causal mask aligned to the end gives each token what it may see.
    out = flash_attn_with_kvcache(
        query.transpose(1, 2),
        key.transpose(1, 2),  # [slots, capacity, heads, dim]
        value.transpose(1, 2),
        cache_seqlens=(where.positions[:, -1] + 1).to(torch.int32),
        cache_batch_idx=where.slots.to(torch.int32),
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
    )
    return out, None


AttentionInterface.register(IMPLEMENTATION, attend_flash)
