"""Module trees over shared weights."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn

_over_the_same: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of the module tree in eval mode over the same weights: adapters put into it leave `model` as it was."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter  # quantised ones carry state that only they know
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    tree = copy.deepcopy(model, memo).eval()
    family = _over_the_same.setdefault(model, WeakSet([model]))
    family.add(tree)
    _over_the_same[tree] = family
    return tree


def trees_over(models: Iterable[nn.Module]) -> list[nn.Module]:
    """All module trees that `share_weights` made over the weights of these models, and the models."""
    found = {id(tree): tree for model in models for tree in (model, *_over_the_same.get(model, ()))}
    return list(found.values())


class Movable:
    """Parameters by where their numbers lie, so that a weight moves in all trees at once."""

    def __init__(self, trees: Iterable[nn.Module]) -> None:
        self._at: dict[Any, list[nn.Parameter]] = {}
        for parameter in (parameter for tree in trees for parameter in tree.parameters()):
            self._at.setdefault(_place(parameter), []).append(parameter)

    def move(self, parameter: Tensor, place: Tensor) -> None:
        """Copy a parameter there, and let all that lay where it lay lie there. Others' gradients stay as they are."""
        place.copy_(parameter)
        for each in self._at.pop(_place(parameter)):
            each.data = place


def _place(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def own_weights(model: nn.Module, shared: Collection[int]) -> None:
    """Give a module tree copies of these of its parameters, named by their ids, so that they can be written to."""
    own = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in model.parameters() if id(p) in shared}
    for module in model.modules():
        module._parameters.update({k: own[id(p)] for k, p in module._parameters.items() if id(p) in own})
