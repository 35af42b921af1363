"""Decide which models the engine can decode with, and how long their sequences may be."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from math import inf
from typing import Any

CACHED_LAYERS = {"full_attention", "sliding_attention"}


def check_supported(role: str, kind: type, config: Any) -> None:
    """Raises ValueError for a model class of transformers whose attention cannot read our key-value cache."""
    if getattr(config, "return_dict", True) is False:
        raise ValueError(f"{role}: return_dict=False in its config: expected true, its outputs have names here")
    unsupported = set(getattr(config.get_text_config(), "layer_types", None) or ()) - CACHED_LAYERS
    if config.is_encoder_decoder or getattr(kind, "_is_stateful", False) or unsupported:
        what = ", ".join(sorted(unsupported)) or "recurrent or encoder-decoder"
    elif not getattr(kind, "_supports_attention_backend", False) or not takes_positions(kind):
        what = "with attention code of their own"
    else:
        return
    raise ValueError(f"{role}: {config.model_type} models ({what}) are not supported: expected plain attention")


def takes_positions(kind: Any) -> bool:
    """Whether the forward of a model class takes the positions of the tokens."""
    return "position_ids" in inspect.signature(kind.forward).parameters


def context_of(config: Any) -> int | None:
    """Return the number of positions that a text config allows, or None if it sets no limit.

    LongRoPE rotates a whole sequence differently once it is longer than the original context, so cached keys would be
    wrong. A sequence therefore ends at the original context.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    originals = [
        rope["original_max_position_embeddings"]
        for rope in (ropes, *ropes.values())  # rope parameters are given once, or for each kind of layer
        if isinstance(rope, Mapping) and rope.get("rope_type") == "longrope"
    ]
    return min(
        [getattr(config, "max_position_embeddings", None), *originals], default=None, key=lambda each: each or inf
    )
