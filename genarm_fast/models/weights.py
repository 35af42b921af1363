"""Module trees over shared weights."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of the module tree in eval mode over the same weights: adapters put into it leave `model` as it was."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter  # quantised ones carry state that only they know
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    return copy.deepcopy(model, memo).eval()
