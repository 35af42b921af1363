"""Kinds of layers: a test of one layer is valid for all layers of its kind, which differ in the weights' values alone.

This needs a decoder that treats its layers alike (`layer_code`). Layers of one kind have the same modules with the same
attributes, except for the layer's index; tensors of the same shapes; the same forward of genarm_fast, if any; and the
same entries in the config's lists.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genarm_fast.engine.layer_code import lists_indexed_by_layer
from genarm_fast.models.fused_decoder import FusedDecoder
from genarm_fast.models.member import Member
from genarm_fast.models.stacked_decoder import StackedDecoder

PLAIN_TYPES = (bool, int, float, bytes, type(None), torch.dtype, torch.device)
MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}  # attributes that every module has
# Forwards of genarm_fast. Their method `of_layers` makes one for some layers.
OWN_FORWARDS = (FusedDecoder, StackedDecoder)


def kinds_of_layers(models: Sequence[Any], runner: Any) -> list[Hashable] | None:
    """Return for each layer a value that is equal for layers of one kind.

    models: the models whose plain forwards are the standard. runner: the module tree that runs them together.

    Returns:
        The values, or None if a test of some layers proves nothing about others.
    """
    trees = [*models, runner]
    layers = [_layers(tree) for tree in trees]
    lists = [_layer_lists(tree) for tree in models]
    if any(each is None or _share_parts(each) for each in layers) or None in lists or not _has_known_forward(runner):
        return None
    if len({len(each) for each in layers if each}) != 1 or len({p.device for t in trees for p in t.parameters()}) != 1:
        return None
    names = [_layer_list_name(tree.base_model) for tree in trees]
    kinds = [
        [tuple(_description(layer, i, name)) for i, layer in enumerate(each)]
        for each, name in zip(layers, names)
        if each
    ]
    own_attributes = [
        () if (own := _own_forward(runner)) is None else _plain_attributes(own.layers[i]) for i in range(len(kinds[0]))
    ]
    return list(zip(*kinds, own_attributes, *(zip(*each) for each in lists if each)))


def _plain_attributes(layer: Any) -> Hashable:
    """Return the plain attributes that a layer of genarm_fast's forwards computes with, besides the weights."""
    return tuple((name, each) for name, each in vars(layer).items() if isinstance(each, PLAIN_TYPES))


def _layer_lists(model: Any) -> list[Any] | None:
    """Return the config's lists that have an entry for each layer, as strings.

    Returns None if the plain forward may tell layers apart in other ways.
    """
    if any(_hooked(module) or "forward" in vars(module) for module in model.modules()) or not _layers(model):
        return None
    entries = _config_lists(model.config)
    read = lists_indexed_by_layer(model.base_model, _layer_list_name(model.base_model))
    return None if read is None or not read <= set(entries) else [list(map(repr, each)) for each in entries.values()]


def _config_lists(config: Any) -> dict[str, Sequence[Any]]:
    """Return the config's lists, by name, that have as many entries as there are layers."""
    count = config.num_hidden_layers
    return {key: each for key, each in vars(config).items() if isinstance(each, (list, tuple)) and len(each) == count}


def _has_known_forward(runner: Any) -> bool:
    return not any(map(_hooked, runner.modules())) and isinstance(_own_forward(runner), (*OWN_FORWARDS, type(None)))


def member_of_layers(member: Member, kept: Sequence[int]) -> Member:
    """Return a copy of the member that has these layers alone, over the same modules. The member does not change."""
    part = copy.copy(member)
    part.model = _of_layers(member.model, kept)
    if member.shared is member.model:
        part.shared = part.model
        vars(part)["runner"] = _of_layers(member.runner, kept)
    else:
        part.shared = _of_layers(member.shared, kept)
    return part


def _of_layers(model: Any, kept: Sequence[int]) -> Any:
    """Return a model of these layers alone, with a shallow copy of the modules above them."""
    whole, decoder = _shallow(model), _shallow(model.base_model)
    name = _layer_list_name(decoder)
    layers = decoder._modules[name]
    decoder._modules[name] = nn.ModuleList(layers[i] for i in kept)
    decoder.config = copy.copy(decoder.config)
    for key, entries in _config_lists(decoder.config).items():
        vars(decoder.config)[key] = [entries[i] for i in kept]
    if (forward := _own_forward(model)) is not None:
        decoder.forward = forward.of_layers(kept)
    whole._modules[model.base_model_prefix] = decoder
    return whole


def _shallow(module: Any) -> Any:
    made: Any = object.__new__(type(module))
    vars(made).update(vars(module))
    vars(made)["_modules"] = dict(module._modules)
    return made


def _own_forward(model: Any) -> Any:
    return vars(model.base_model).get("forward")


def _layer_list_name(decoder: Any) -> str:
    """Return the name of the decoder's list of layers; "" if there is no such list, or more than one."""
    lists = [name for name, module in decoder.named_children() if isinstance(module, nn.ModuleList)]
    return lists[0] if len(lists) == 1 else ""


def _layers(model: Any) -> list[Any] | None:
    """Return the decoder's layers; None unless the model has this one decoder, with as many as its config says."""
    decoder, config = model.base_model, model.config
    if config.get_text_config() is not config or model._modules.get(model.base_model_prefix) is not decoder:
        return None
    if decoder.config is not config or not (name := _layer_list_name(decoder)):
        return None
    layers = list(getattr(decoder, name))
    return layers if len(layers) == config.num_hidden_layers else None


def _share_parts(layers: Sequence[nn.Module]) -> bool:
    """Whether two of the layers share a module or a parameter."""
    parts = [id(each) for layer in layers for each in (*layer.modules(), *layer.parameters())]
    return len(set(parts)) < len(parts)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class LayerPlace(NamedTuple):
    """The layer that has an attribute. modules: names of its modules by id. path: the layer's path in the decoder."""

    modules: dict[int, str]
    path: str


def _description(layer: nn.Module, index: int, layers: str) -> Iterator[Hashable]:
    """Iterate over descriptions of a layer's modules: name, type, attributes and tensors, except the layer's index."""
    place = LayerPlace({id(module): name for name, module in layer.named_modules()}, f"{layers}.{index}.")
    for name, module in layer.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in MODULE_ATTRIBUTES}
        if type(own.get("layer_idx")) is int and own["layer_idx"] == index:
            del own["layer_idx"]
        tensors = {**module._parameters, **module._buffers}
        yield (name, type(module), *((key, _described(each, place)) for key, each in {**own, **tensors}.items()))


def _described(value: Any, place: LayerPlace) -> Hashable:
    """Return a value that is equal for attributes that do the same in modules of two layers."""
    if isinstance(value, str):  # PEFT's modules hold their own paths
        return str, value.replace(place.path, "")
    if isinstance(value, PLAIN_TYPES):
        return type(value), value
    if isinstance(value, Tensor):
        held = getattr(value, "linear", None)
        return type(value), value.shape, value.stride(), value.dtype, value.device, _described(held, place)
    if isinstance(value, nn.Module):
        return type(value), place.modules.get(id(value), id(value))
    if isinstance(value, dict):
        return dict, *((_described(key, place), _described(each, place)) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), *(_described(each, place) for each in value)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_described(each, place) for each in value)
    if isinstance(value, partial):
        return partial, value.func, _described(value.args, place), _described(value.keywords, place)
    if isinstance(value, MethodType):
        return MethodType, _code(value.__func__), _described(value.__self__, place)
    if isinstance(value, FunctionType):
        return _code(value)
    if type(value).__module__.startswith("genarm_fast."):
        return type(value), *((name, _described_attribute(name, each, place)) for name, each in _attributes(value))
    return type(value), id(value)


def _code(function: Any) -> Hashable:
    """Return a value that is equal for functions with the same code; one with a closure is equal to itself alone."""
    code = getattr(function, "__code__", None)
    return (FunctionType, id(function)) if code is None or function.__closure__ else (FunctionType, code)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    names = getattr(type(value), "__slots__", None) or vars(value)
    yield from ((name, getattr(value, name)) for name in names)


def _described_attribute(name: str, value: Any, place: LayerPlace) -> Hashable:
    """Describe an attribute of genarm_fast's objects. A private one is an address or None; which one is described."""
    return value is None if name.startswith("_") else _described(value, place)
