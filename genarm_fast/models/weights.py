"""Module trees over shared weights."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import nn


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of the module tree in eval mode over the same weights: adapters put into it leave `model` as it was."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter  # quantised ones carry state that only they know
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    return copy.deepcopy(model, memo).eval()


def own_weights(model: nn.Module, shared: Collection[int]) -> None:
    """Give a module tree copies of these of its parameters, named by their ids, so that they can be written to."""
    own = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in model.parameters() if id(p) in shared}
    for module in model.modules():
        module._parameters.update({k: own[id(p)] for k, p in module._parameters.items() if id(p) in own})
