"""Load the members' models from hub ids, folders, PEFT adapters or given models. Shared weights are in memory once."""

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
from genarm_fast.models.hub import OPTIONS, Source, adapter_folder, hub_options, locate, subfolder_of
from genarm_fast.models.quantized import check_quantization, quantize_model
from genarm_fast.models.weights import share_weights
from genarm_fast.utils.checks import shown


def check_device(device: Any) -> torch.device:
    """Return the torch device. None means CUDA if there is any, else the CPU.

    Raises:
        ValueError: a device that is not here.
    """
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
    """Raises ValueError for a dtype that transformers does not accept as the precision of weights."""
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype in (None, "auto") or isinstance(dtype, dict):  # a dict gives the dtype of each part of a composite model
        return
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f"dtype={dtype!r:.60}: expected auto, float32, bfloat16, float16, or another float of torch")


def _key(source: Source) -> str:
    return os.path.realpath(source) if os.path.isdir(source) else os.fspath(source)


class ModelLoader:
    """The models loaded for one `GenARM`. An adapter gets its own module tree over the weights of its base."""

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
        self.loaded: dict[str, Any] = {}  # from a source to its bare transformers model, without adapters
        # From a source to the location of its model, and the location without the subfolder.
        self.locations: dict[str, tuple[Source, Source]] = {}
        # From the id of a given model in training mode to its copy in eval mode.
        self.eval_copies: dict[int, nn.Module] = {}
        self.adapted_roles: dict[int, str] = {}  # from the id of a given model with an adapter to its role

    def locate(self, role: str, source: Source) -> Source:
        """Return where to read the files of a source; each source is looked for once.

        Raises:
            FileNotFoundError: the source is found nowhere.
        """
        return self._locate_both(role, source)[0]

    def tokenizer_locations(self, role: str, source: Source) -> list[Source]:
        """Return the locations where a source's tokenizer may be: the model's folder, then the one around a subfolder.

        The errors are those of `locate`.
        """
        return list(dict.fromkeys(self._locate_both(role, source)))

    def _locate_both(self, role: str, source: Source) -> tuple[Source, Source]:
        """Return the location of a source's model, and the location without the subfolder."""
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"{role}={shown(source)}: expected {MODEL}")
        key = _key(source)
        if key not in self.locations:
            main_location = locate(role, source, **{name: self.kwargs[name] for name in OPTIONS if name in self.kwargs})
            # An ARM that lacks the subfolder of the base's model is an ordinary one: its model is in its main folder.
            inside = subfolder_of(main_location, self.subfolder) if self.subfolder else None
            self.locations[key] = inside or main_location, main_location
        return self.locations[key]

    def load(
        self,
        role: str,
        source: Source | nn.Module,
        *,
        base: Source | nn.Module | None = None,
        trust_remote_code: bool = False,
        quantization: str | None = None,
    ) -> nn.Module:
        """Return the model of a member, in eval mode. A loaded model is used as it is.

        role: the member's role, named in errors. base: the model that an adapter belongs to, instead of the base that
        the adapter's folder names. quantization: how this member's weights are held, instead of the loader's setting.
        """
        if base is not None and (isinstance(source, nn.Module) or not self._is_adapter(role, source)):
            raise ValueError(f"{role}: base={base!r:.80}: expected none, as its model is no folder of an adapter")
        if isinstance(source, nn.Module):
            if quantization is not None:
                raise ValueError(
                    f"{role}: quantization={quantization!r}: expected a folder or hub id, not a loaded model"
                )
            model = self._given(role, source)
            if model.training and id(model) not in self.eval_copies:
                self.eval_copies[id(model)] = share_weights(model)
            return self.eval_copies[id(model)] if model.training else model
        location, main_location = self._locate_both(role, source)
        if role == "base" and self.subfolder and location is main_location:
            what = f"base={os.fspath(source)!r}: subfolder={self.subfolder!r}"
            raise FileNotFoundError(f"{what}: expected it to be there")
        if self._is_adapter(role, source):
            if quantization is not None:
                raise ValueError(
                    f"{role}: quantization={quantization!r}: expected none for an adapter, it has its base's weights"
                )
            return self._load_adapter(role, os.fspath(adapter_folder(location)), base, trust_remote_code)
        return self._load_bare(role, source, trust_remote_code, quantization)

    def _is_adapter(self, role: str, source: Source) -> bool:
        return bool(read_object(role, self.locate(role, source), "adapter_config.json"))

    def _given(self, role: str, model: Any) -> Any:
        """Return the model inside a PEFT model or a compiled one. Any other model is returned as it is.

        Raises:
            TypeError: a model that is no causal LM.
            ValueError: an adapter that is not supported, or a model where it is not clear which adapter is meant.
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
        other = self.adapted_roles.setdefault(id(inside), role) if is_adapted(inside) else role
        if other != role:
            raise ValueError(
                f"{role}: the same adapted model as {other}, with the same active adapter: expected another object for"
                " each, or the adapters' folders"
            )
        return inside

    def register_given(self, name: str, model: nn.Module) -> None:
        """Let adapters share the weights of a model that the caller gave already loaded."""
        self.loaded[_key(name)] = model

    def _load_bare(self, role: str, source: Source, trust_remote_code: bool, own: str | None = None) -> Any:
        quantization = own or self.quantization
        key = _key(source)
        if self.subfolder and key not in self.loaded and os.path.isdir(source):
            # The same key then serves the outer folder and the one inside it.
            key = _key(self.locate(role, source))
        key = key if own in (None, self.quantization) else f"{key} ({own})"
        if key not in self.loaded:
            location = self.locate(role, source)
            coded_config: dict[str, Any] | None = None
            if quantization and "gguf_file" not in self.kwargs:
                coded_config = coded_checkpoint.quantization_config_of(role, location)
            codes: dict[str, QuantWeight] = {}
            if coded_config is not None and quantization is not None:
                coded_checkpoint.check_method(f"{role}={os.fspath(location)!r}", location, coded_config, quantization)
                model, codes = load_coded(
                    role, location, coded_config, trust_remote_code=trust_remote_code, **self.kwargs
                )
            else:
                model = load_causal_lm(
                    role, location, trust_remote_code=trust_remote_code, **self._kwargs_for(role, location)
                )
            model = (model if self.device is None else model.to(self.device)).eval()
            if quantization is not None:
                quantize_model(role, model, quantization, codes)
            self.loaded[key] = model
        return self.loaded[key]

    def _kwargs_for(self, role: str, location: Source) -> dict[str, Any]:
        """Return the keyword arguments for transformers.

        An ARM's folder that lacks the base's GGUF file is an ordinary checkpoint.
        """
        kwargs = self.kwargs | hub_options(location)
        name = kwargs.get("gguf_file")
        if name is None:
            return kwargs
        if role != "base" and os.path.isdir(location) and not os.path.exists(os.path.join(location, name)):
            return {key: value for key, value in kwargs.items() if key != "gguf_file"}
        # A dequantised model is plain: it has a fingerprint, can share lanes and take our codes. Callers may ask for
        # GGUF's own blocks instead.
        config = getattr(transformers, "GgufConfig", None)  # None in an older transformers, which always dequantises
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
        """Return the loaded model that the adapter was trained on, else load its base and check the fingerprint.

        recorded: the base that the adapter's folder names. named: the base that the caller names; None if the caller
        names none.
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
            return model  # there is nothing to check, and the caller named the base
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
