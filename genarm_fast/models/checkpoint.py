"""A model from a checkpoint: of the hub, of a folder, of a PEFT adapter, or as given. Weights are in memory once."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from genarm_fast.models.fingerprint import fingerprint
from genarm_fast.models.hub import Source, find_file, locate, read_json
from genarm_fast.models.weights import share_weights


def _causal_lm(role: str, model: Any) -> Any:
    """What is inside a PEFT model or a compiled one; others are taken as they are."""
    model = getattr(model, "_orig_mod", model)
    if not hasattr(model, "config") or model.get_output_embeddings() is None:
        raise TypeError(f"{role}: expected a causal LM of transformers, got {type(model).__name__}")
    if hasattr(model, "get_base_model"):
        for config in model.peft_config.values():
            _check_peft(role, config)
        return model.get_base_model()
    return model


def _check_peft(what: str, config: Any) -> None:
    if config.is_prompt_learning:
        raise ValueError(f"{what}: {config.peft_type.value} adapters add virtual tokens; expected LoRA-like")


def _own_saved(model: nn.Module, adapter: str) -> nn.Module:
    """Give `model` its own tensors where PEFT will load others into them: biases or embeddings trained with a LoRA."""
    from peft import load_peft_weights

    own: dict[int, nn.Parameter] = {}
    parameters = dict(model.named_parameters())
    for name, saved in load_peft_weights(adapter, device="cpu").items():
        old = parameters.get(name.removeprefix("base_model.model.").replace(".base_layer.", "."))
        if old is not None and not torch.equal(old, saved.to(old)):
            own[id(old)] = nn.Parameter(old.clone(), requires_grad=False)
    for module in model.modules():
        module._parameters.update({k: own[id(p)] for k, p in module._parameters.items() if id(p) in own})
    return model


def check_device(device: Any) -> torch.device:
    """As torch has it; None: CUDA if there is any, else the CPU. Raises ValueError for one that is not here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = 0 if accelerator is None else torch.accelerator.device_count()
    here = ", ".join(["cpu", *(f"{accelerator}:{index}" for index in range(count))])
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}: expected one that is here: {here}") from error
    if found.type != "cpu" and (accelerator is None or found.type != accelerator.type or (found.index or 0) >= count):
        raise ValueError(f"device={device!r}: expected one that is here: {here}")
    return found


def _key(source: Source) -> str:
    return os.path.realpath(source) if os.path.isdir(source) else os.fspath(source)


class ModelLoader:
    """Models loaded for one `GenARM`. An adapter gets its own module tree over the weights of its base."""

    def __init__(self, *, dtype: Any, device: Any, device_map: Any, quantization_config: Any, **kwargs: Any) -> None:
        device = check_device(device)
        if device_map is None and quantization_config is not None:
            device_map = {"": device}  # quantised weights cannot be moved afterwards
        self.device = device if device_map is None else None
        self.kwargs = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config, **kwargs}
        self.kwargs = {name: value for name, value in self.kwargs.items() if value is not None}
        self.loaded: dict[str, Any] = {}  # source → bare transformers model, without adapters
        self.places: dict[str, Source] = {}

    def locate(self, role: str, source: Source) -> Source:
        """Where to read its files; each source is looked for once. Raises FileNotFoundError if there are none."""
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"{role}={source!r}: expected a hub id, a folder or a loaded model")
        key = _key(source)
        if key not in self.places:
            options = {name: self.kwargs[name] for name in ("revision", "cache_dir", "token") if name in self.kwargs}
            self.places[key] = locate(role, source, **options)
        return self.places[key]

    def load(self, role: str, source: Source | nn.Module) -> nn.Module:
        """The model of a member, in eval mode. `role` names it in errors. A module is taken as it is."""
        if isinstance(source, nn.Module):
            model = _causal_lm(role, source)
            return share_weights(model) if model.training else model
        place = self.locate(role, source)
        if find_file(place, "adapter_config.json"):
            return self._load_adapter(role, os.fspath(place))
        return self._load_bare(role, source)

    def adopt(self, name: str, model: nn.Module) -> None:
        """Let adapters share the weights of a model that was given, not loaded."""
        self.loaded[_key(name)] = model

    def _load_bare(self, role: str, source: Source) -> Any:
        key = _key(source)
        if key not in self.loaded:
            try:
                model = AutoModelForCausalLM.from_pretrained(self.locate(role, source), **self.kwargs)
            except OSError as error:
                raise OSError(f"{role}={key!r}: expected a folder or a hub id that can be loaded") from error
            self.loaded[key] = (model if self.device is None else model.to(self.device)).eval()
        return self.loaded[key]

    def _load_adapter(self, role: str, source: str) -> nn.Module:
        from peft import PeftConfig, PeftModel

        config = PeftConfig.from_pretrained(source)
        _check_peft(f"{role}={source!r}", config)
        base = self._adapter_base(role, source, config.base_model_name_or_path)
        # The adapter computes in the base's dtype, as it will when several share one forward.
        tree = _own_saved(share_weights(base), source)
        adapted = PeftModel.from_pretrained(tree, source, autocast_adapter_dtype=False)
        return adapted.get_base_model().eval()

    def _adapter_base(self, role: str, source: str, base: str | None) -> Any:
        """The loaded model that the adapter was trained on, else its own base, checked by fingerprint."""
        expected = read_json(source, "genarm.json").get("base_fingerprint")
        for model in self.loaded.values():
            if expected is not None and fingerprint(model) == expected:
                return model
        loaded = ", ".join(map(repr, self.loaded)) or "none"
        wanted = f"{role}={source!r} is an adapter of {base!r}"
        try:
            model = self._load_bare(role, base or "")
        except OSError as error:
            raise ValueError(
                f"{wanted}, which can't be loaded; expected an adapter of a loaded model ({loaded})"
            ) from error
        found = fingerprint(model)
        if expected is None or found is None:
            warnings.warn(f"{wanted}: no fingerprint to check that against, so it is believed", stacklevel=2)
        elif found != expected:
            raise ValueError(
                f"{wanted} with fingerprint {expected}; expected one of the loaded models ({loaded}), but their weights"
                f" differ from those it was trained on (fingerprint {found})"
            )
        return model
