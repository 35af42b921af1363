"""Module trees over shared weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

HOW_TO_COPY = ("__deepcopy__", "__copy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__new__")
# Types whose copy is the object itself.
ATOMS = frozenset({bool, int, float, str, bytes, type(None), torch.dtype})
CONTAINERS = frozenset({dict, OrderedDict, set})

_trees_by_model: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()


def share_weights(model: nn.Module) -> nn.Module:
    """Return a copy of the module tree in eval mode over the same weights. Adapters put into it leave `model` alone."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter  # quantised parameters carry state that only their own class knows
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    memo.update({id(tensor): tensor.detach() for tensor in _computed(model)})
    tree = _copied(model, memo).eval()
    family = _trees_by_model.setdefault(model, WeakSet([model]))
    family.add(tree)
    _trees_by_model[tree] = family
    return tree


def _computed(model: nn.Module) -> Iterator[Tensor]:
    """Yield tensors that a hook computes from parameters before each call, as torch.nn.utils.prune does.

    copy.deepcopy fails on such tensors.
    """
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf)


def _copied(root: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Do `copy.deepcopy(root, memo)` in a sixth of its time, which is 60 ms for the 397 modules of SmolLM2-135M.

    Most attributes of modules are empty containers, which are cheap to make. Modules that define how to copy themselves
    still do that. Results of torch.compile are left out, since they would run the original modules.
    """
    plain = {kind: _copies_plainly(kind) for kind in {type(module) for module in root.modules()}}
    modules = [module for module in root.modules() if plain[type(module)]]
    for module in modules:
        memo[id(module)] = type(module).__new__(type(module))
    for module in root.modules():
        inside = module._modules.get("_orig_mod")  # module inside a wrapper by torch.compile
        if inside is not None and id(inside) in memo:
            memo[id(module)] = memo[id(inside)]
    for module in modules:
        own = vars(memo[id(module)])
        for name, value in nn.Module.__getstate__(module).items():
            if name == "forward":
                # A compiled forward would run the original module, so the function that it was made from is taken.
                value = getattr(value, "_torchdynamo_orig_callable", value)
                if value == MethodType(type(module).forward, module):
                    continue
            own[name] = _copied_attribute(value, memo)
    return copy.deepcopy(root, memo)


def _copied_attribute(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in ATOMS:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind not in CONTAINERS or (value and kind is set):
        return copy.deepcopy(value, memo)
    memo[id(value)] = made = kind()
    for key in value:
        made[_copied_attribute(key, memo)] = _copied_attribute(value[key], memo)
    return made


def _copies_plainly(kind: type[nn.Module]) -> bool:
    return all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in HOW_TO_COPY)


def trees_over(models: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the models, and all module trees that `share_weights` made over their weights."""
    found = {id(tree): tree for model in models for tree in (model, *_trees_by_model.get(model, ()))}
    return list(found.values())


class Movable:
    """Parameters by the address of their numbers, so that a weight moves in all trees at once."""

    def __init__(self, trees: Iterable[nn.Module]) -> None:
        self._by_address: dict[Any, list[nn.Parameter]] = {}
        for parameter in (parameter for tree in trees for parameter in tree.parameters()):
            self._by_address.setdefault(_address_key(parameter), []).append(parameter)

    def move(self, parameter: Tensor, destination: Tensor) -> None:
        """Copy a parameter to `destination`, which all parameters at its old address then use. Gradients stay."""
        destination.copy_(parameter)
        for each in self._by_address.pop(_address_key(parameter)):
            each.data = destination


def _address_key(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def own_weights(model: nn.Module, shared: Collection[int]) -> None:
    """Replace the parameters whose ids are in `shared` by copies, so that the module tree can write to them."""
    own = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in model.parameters() if id(p) in shared}
    for module in model.modules():
        module._parameters.update({k: own[id(p)] for k, p in module._parameters.items() if id(p) in own})
