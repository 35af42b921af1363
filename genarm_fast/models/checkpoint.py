"""The members' models from their sources: hub ids, folders, PEFT adapters, given models. Weights are in memory once."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch
import transformers
from torch import nn

from genarm_fast.kernels.quant_linear import QuantWeight
from genarm_fast.models import coded_checkpoint
from genarm_fast.models.adapter import check_alone, check_forward, check_kind, is_adapted, load_adapter
from genarm_fast.models.arm import MODEL
from genarm_fast.models.causal_lm import load_causal_lm, load_coded
from genarm_fast.models.files import check_files, read_object
from genarm_fast.models.fingerprint import fingerprint
from genarm_fast.models.hub import OPTIONS, Source, adapter_folder, hub_options, locate, within
from genarm_fast.models.quantized import check_quantization, quantize_model
from genarm_fast.models.weights import share_weights
from genarm_fast.utils.checks import shown


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


def check_dtype(dtype: Any) -> None:
    """Raises ValueError for what transformers takes for no precision of weights."""
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype in (None, "auto") or isinstance(dtype, dict):  # of each part of a composite model
        return
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f"dtype={dtype!r:.60}: expected auto, float32, bfloat16, float16, or another float of torch")


def _key(source: Source) -> str:
    return os.path.realpath(source) if os.path.isdir(source) else os.fspath(source)


class ModelLoader:
    """Models loaded for one `GenARM`. An adapter gets its own module tree over the weights of its base."""

    def __init__(
        self,
        *,
        dtype: Any,
        device: Any,
        device_map: Any,
        quantization_config: Any,
        quantization: str | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(subfolder, (str, os.PathLike, type(None))):
            raise TypeError(f"subfolder={subfolder!r}: expected the name of a folder in those of the members")
        device = check_device(device)
        check_dtype(dtype)
        if taken := sorted({"ignore_mismatched_sizes", "output_loading_info"} & set(kwargs)):
            raise TypeError(f"{taken[0]}: expected no such argument, what does not fit is refused")
        if sys.flags.optimize > 1:
            raise RuntimeError("python -OO, or PYTHONOPTIMIZE=2: expected at most 1, as transformers reads docstrings")
        check_quantization("quantization", quantization)
        self.quantization, self.subfolder = quantization, os.fspath(subfolder or "")
        if device_map is None and quantization_config is not None:
            device_map = {"": device}  # quantised weights cannot be moved afterwards
        self.device = device if device_map is None else None
        self.kwargs = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config, **kwargs}
        self.kwargs = {name: value for name, value in self.kwargs.items() if value is not None}
        self.loaded: dict[str, Any] = {}  # source → bare transformers model, without adapters
        self.places: dict[str, tuple[Source, Source]] = {}  # source → where its model is, and what that is a part of
        self.evaluated: dict[int, nn.Module] = {}  # id of a given model in training mode → the same in eval mode
        self.adapted: dict[int, str] = {}  # id of a given model with an adapter → its role

    def locate(self, role: str, source: Source) -> Source:
        """Where to read its files; each source is looked for once. Raises FileNotFoundError if there are none."""
        return self._placed(role, source)[0]

    def tokenizer_places(self, role: str, source: Source) -> list[Source]:
        """Where its tokenizer may be: beside the model, or else beside its subfolder. Raises as `locate`."""
        return list(dict.fromkeys(self._placed(role, source)))

    def _placed(self, role: str, source: Source) -> tuple[Source, Source]:
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"{role}={shown(source)}: expected {MODEL}")
        key = _key(source)
        if key not in self.places:
            whole = locate(role, source, **{name: self.kwargs[name] for name in OPTIONS if name in self.kwargs})
            # An ARM without the subfolder that the base's model is in is an ordinary one.
            self.places[key] = (within(whole, self.subfolder) if self.subfolder else None) or whole, whole
        return self.places[key]

    def load(
        self,
        role: str,
        source: Source | nn.Module,
        *,
        base: Source | nn.Module | None = None,
        trust_remote_code: bool = False,
        quantization: str | None = None,
    ) -> nn.Module:
        """The model of a member, in eval mode. `role` names it in errors. A module is taken as it is.

        base: what an adapter belongs to, instead of what its folder says. quantization: of this member, instead of the
        loader's.
        """
        if base is not None and (isinstance(source, nn.Module) or not self._is_adapter(role, source)):
            raise ValueError(f"{role}: base={base!r:.80}: expected none, as its model is no folder of an adapter")
        if isinstance(source, nn.Module):
            if quantization is not None:
                raise ValueError(
                    f"{role}: quantization={quantization!r}: expected a folder or hub id, not a loaded model"
                )
            model = self._given(role, source)
            if model.training and id(model) not in self.evaluated:
                self.evaluated[id(model)] = share_weights(model)
            return self.evaluated[id(model)] if model.training else model
        place, whole = self._placed(role, source)
        if role == "base" and self.subfolder and place is whole:
            what = f"base={os.fspath(source)!r}: subfolder={self.subfolder!r}"
            raise FileNotFoundError(f"{what}: expected it to be there")
        if self._is_adapter(role, source):
            if quantization is not None:
                raise ValueError(
                    f"{role}: quantization={quantization!r}: expected none for an adapter, it has its base's weights"
                )
            return self._load_adapter(role, os.fspath(adapter_folder(place)), base, trust_remote_code)
        return self._load_bare(role, source, trust_remote_code, quantization)

    def _is_adapter(self, role: str, source: Source) -> bool:
        return bool(read_object(role, self.locate(role, source), "adapter_config.json"))

    def _given(self, role: str, model: Any) -> Any:
        """What is inside a PEFT model or a compiled one; others are taken as they are.

        Raises:
            TypeError: no causal LM.
            ValueError: an adapter that is not supported, or a model of which it is not clear which adapter is meant.
        """
        model = getattr(model, "_orig_mod", model)
        if not hasattr(model, "config") or model.get_output_embeddings() is None:
            raise TypeError(f"{role}: expected a causal LM of transformers, got {type(model).__name__}")
        inside = model
        if hasattr(model, "get_base_model"):
            for config in model.peft_config.values():
                check_kind(role, config)
            inside = model.get_base_model()
            if hasattr(inside, "get_base_model"):
                raise ValueError(f"{role}: a PeftModel inside a PeftModel: expected one, with the inner one merged")
            check_forward(role, model)
        elif is_adapted(model) and not getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"{role}: PEFT has put an adapter into this model: expected one without, loaded anew, or the PeftModel"
            )
        other = self.adapted.setdefault(id(inside), role) if is_adapted(inside) else role
        if other != role:
            raise ValueError(
                f"{role}: the same adapted model as {other}, with the same active adapter: expected another object for"
                " each, or the adapters' folders"
            )
        return inside

    def adopt(self, name: str, model: nn.Module) -> None:
        """Let adapters share the weights of a model that was given, not loaded."""
        self.loaded[_key(name)] = model

    def _load_bare(self, role: str, source: Source, trust_remote_code: bool, own: str | None = None) -> Any:
        quantization = own or self.quantization
        key = _key(source)
        if self.subfolder and key not in self.loaded and os.path.isdir(source):
            key = _key(self.locate(role, source))  # so that both the folder and the one inside it name it
        key = key if own in (None, self.quantization) else f"{key} ({own})"
        if key not in self.loaded:
            place = self.locate(role, source)
            coded = coded_checkpoint.coded(role, place) if quantization and "gguf_file" not in self.kwargs else None
            codes: dict[str, QuantWeight] = {}
            if coded is not None and quantization is not None:
                coded_checkpoint.check_method(f"{role}={os.fspath(place)!r}", place, coded, quantization)
                model, codes = load_coded(role, place, coded, trust_remote_code=trust_remote_code, **self.kwargs)
            else:
                model = load_causal_lm(
                    role, place, trust_remote_code=trust_remote_code, **self._kwargs_for(role, place)
                )
            model = (model if self.device is None else model.to(self.device)).eval()
            if quantization is not None:
                quantize_model(role, model, quantization, codes)
            self.loaded[key] = model
        return self.loaded[key]

    def _kwargs_for(self, role: str, place: Source) -> dict[str, Any]:
        """To transformers. An ARM's folder without the GGUF file that is the base's is an ordinary checkpoint."""
        kwargs = self.kwargs | hub_options(place)
        name = kwargs.get("gguf_file")
        if name is None:
            return kwargs
        if role != "base" and os.path.isdir(place) and not os.path.exists(os.path.join(place, name)):
            return {key: value for key, value in kwargs.items() if key != "gguf_file"}
        # Dequantised, it is a plain model, with a fingerprint, lanes and our own codes. Callers may ask for its blocks.
        config = getattr(transformers, "GgufConfig", None)  # None: an older one, which always dequantises
        dense = {} if config is None else {"quantization_config": config(dequantize=True)}
        return dense | kwargs

    def _load_adapter(
        self, role: str, source: str, base: Source | nn.Module | None, trust_remote_code: bool
    ) -> nn.Module:
        check_files(role, source)
        what = f"{role}={source!r}"
        recorded = read_object(role, source, "adapter_config.json").get("base_model_name_or_path")
        if base is None:
            check_alone(what, source, recorded)
        return load_adapter(what, source, self._adapter_base(role, source, recorded, base, trust_remote_code))

    def _adapter_base(self, role: str, source: str, recorded: Any, named: Any, trust_remote_code: bool) -> Any:
        """The loaded model that the adapter was trained on, else its own base, checked by fingerprint.

        recorded: what its folder says of its base. named: what the caller says of it; None for nothing.
        """
        base = recorded if named is None else named
        expected = read_object(role, source, "genarm.json").get("base_fingerprint")
        for model in self.loaded.values() if named is None else ():
            if expected is not None and fingerprint(model) == expected:
                return model
        loaded = ", ".join(map(repr, self.loaded)) or "none"
        its_base = "the given base" if isinstance(base, nn.Module) else repr(base)
        wanted = f"{role}={source!r} is an adapter of {its_base}"
        try:
            given = isinstance(base, nn.Module)
            model = self._given(role, base) if given else self._load_bare(role, base or "", trust_remote_code)
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"{wanted}, which can't be loaded; expected an adapter of a loaded model ({loaded}). If that base has"
                f" moved or has another name here, say where it is: ARM({source!r}, base=...): {error}"
            ) from error
        found = fingerprint(model)
        if named is not None and (expected is None or found is None):
            return model  # the caller says so
        if expected is None or found is None:
            warnings.warn(f"{wanted}: no fingerprint to check that against, so it is believed", stacklevel=2)
        elif found != expected:
            trained = read_object(role, source, "genarm.json").get("dtype")
            now = str(getattr(model, "dtype", None)).removeprefix("torch.")
            rounded = f". It was trained in float16, this is {now}: try dtype='float16'" if trained == "float16" else ""
            raise ValueError(
                f"{wanted} with fingerprint {expected}; expected one of the loaded models ({loaded}), but their weights"
                f" differ from those it was trained on (fingerprint {found}){rounded}"
            )
        return model
