"""Attention over our cache as transformers calls it: a name for a model's config, and the function."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from genarm_fast.kernels.ragged_attention import ragged_attention
from genarm_fast.models.forward_context import current_positions

IMPLEMENTATION = "genarm_fast_ragged"  # transformers has no mask function of this name, so it makes no mask
UNSUPPORTED = ("s_aux", "position_bias")  # attention sinks and biases, which the op does not compute


def attend(
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
    """Compute causal attention over the cache, as an attention function of transformers.

    query: [N, heads, q, dim] → [N, q, heads, dim].

    Raises:
        NotImplementedError: a mask, attention sinks or biases.
    """
    if attention_mask is not None or any(kwargs.get(name) is not None for name in UNSUPPORTED):
        raise NotImplementedError(f"{type(module).__name__} asks for more than causal attention")
    where = current_positions(query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return (
        ragged_attention(
            query,
            key,
            value,
            where.slots,
            where.positions,
            scale=scale,
            window=sliding_window,
            softcap=softcap,
            limit=where.kv_bound,
            arrivals=where.arrivals,
        ),
        None,
    )


AttentionInterface.register(IMPLEMENTATION, attend)
