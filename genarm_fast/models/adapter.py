"""PEFT adapters: which are supported, and how to put one on a base whose weights must stay as they are."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from genarm_fast.models.files import read_object, refusing
from genarm_fast.models.fingerprint import fingerprint
from genarm_fast.models.hub import Source
from genarm_fast.models.patterns import check_patterns
from genarm_fast.models.weights import own_weights, share_weights

TASKS = (None, "CAUSAL_LM")
# Fields of LoRA that take effect in the modules themselves, or that only describe the training. Other fields need
# PEFT's own forward, or name code to import.
LORA_FIELDS = {
    "r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "bias", "lora_bias",
    "use_rslora", "use_dora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "trainable_token_indices", "target_parameters", "ensure_weight_tying",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
}  # fmt: skip
# Initialisations of LoRA that leave the base's weights alone, and initialisations that loading repeats, number for
# number.
INITS_KEEPING_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
REPEATED_INITS = ("pissa", "olora", "loftq")
# Kinds of adapters that leave the base's weights alone as well.
KINDS_KEEPING_BASE = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "VERA", "OFT", "BOFT", "HRA", "LN_TUNING")
MAX_LISTED_NAMES = 3  # most names of tensors in an error


def load_adapter(what: str, source: Source, base: nn.Module) -> nn.Module:
    """Return the base's module tree with an adapter in it, over the base's weights.

    The adapter computes in the base's dtype, because adapters that share one forward all do. what: the adapter's name
    in errors.

    Raises:
        ValueError: an adapter of a kind that is not supported, or an adapter with missing matrices, further matrices,
            or matrices of other shapes than the base needs.
    """
    from peft import PeftModel, load_peft_weights

    config = checked_config(what, source)
    check_patterns(what, config, [name for name, _ in base.named_modules()])
    with refusing(what, "an adapter with weights that can be read"):
        saved = load_peft_weights(os.fspath(source), device="cpu")
    _check_vocabulary(what, base, saved)
    before = fingerprint(base)
    tree = share_weights(base)
    own_weights(tree, _rewritten(tree, config, saved))
    with refusing(what, "an adapter that PEFT can put on its base"), _no_numbers_to_overwrite(config):
        adapted = PeftModel(tree, config, autocast_adapter_dtype=False)
        renamed = getattr(tree, "_checkpoint_conversion_mapping", {})
        result = adapted.load_adapter(source, "default", autocast_adapter_dtype=False, key_mapping=renamed)
    missing = _not_loaded(adapted, result.missing_keys)
    for problem, names in (("lacks", missing), ("has no place for", result.unexpected_keys)):
        if names:
            raise ValueError(
                f"{what}: expected the matrices of its adapter_config.json, {problem} {listed_names(names)}"
            )
    if fingerprint(base) != before:
        raise RuntimeError(f"{what}: loading it changed the weights of its base")
    check_forward(what, adapted)
    return adapted.get_base_model().eval()


def check_alone(what: str, folder: str, recorded: Any) -> None:
    """Raises ValueError for a folder that holds an adapter and also a whole model that is not the adapter's base.

    The whole model may be the merged one. recorded: the adapter's base, as the folder names it.
    """
    whole = [
        path.name for pattern in ("model*.safetensors", "pytorch_model*.bin") for path in Path(folder).glob(pattern)
    ]
    own = os.path.isdir(str(recorded)) and os.path.samefile(str(recorded), folder)
    if whole and not own and Path(folder, "config.json").is_file():
        raise ValueError(
            f"{what}: a whole model ({min(whole)}) and an adapter of {recorded!r}: expected one of them in a folder;"
            " transformers puts such an adapter on the model beside it, which ARM(..., base=THE SAME FOLDER) does"
        )


def check_kind(what: str, config: Any) -> None:
    """Raises ValueError for an adapter that does not work in its adapted modules alone."""
    kind = plain(config.peft_type)
    if config.is_prompt_learning:
        raise ValueError(f"{what}: {kind} adapters add virtual tokens; expected LoRA-like")
    if plain(config.task_type) not in TASKS:
        raise ValueError(
            f"{what}: task_type={plain(config.task_type)!r}: expected an adapter of a causal LM, CAUSAL_LM"
        )
    if kind == "LORA":
        default = type(config)()
        for field in fields(config):
            value = getattr(config, field.name)
            if field.name not in LORA_FIELDS and value and value != getattr(default, field.name):
                raise ValueError(
                    f"{what}: {field.name}={value!r:.60}: expected a LoRA without it, which isn't supported"
                )


@torch.inference_mode()
def check_forward(what: str, adapted: Any) -> None:
    """Raises ValueError if PEFT's forward does more than the adapted modules: only these modules run here."""
    if all(plain(config.peft_type) == "LORA" for config in adapted.peft_config.values()):
        return  # `check_kind` has checked these by their fields
    inside = adapted.get_base_model().eval()
    tokens = torch.arange(1, 9, device=inside.get_input_embeddings().weight.device)[None]
    tokens = tokens % inside.config.get_text_config().vocab_size
    with refusing(what, "an adapter that runs"):
        theirs, ours = (model.eval()(input_ids=tokens, use_cache=False).logits.float() for model in (adapted, inside))
    if not torch.allclose(theirs, ours, atol=1e-2 * float(ours.std())):
        kinds = ", ".join(sorted({plain(config.peft_type) for config in adapted.peft_config.values()}))
        raise ValueError(f"{what}: expected an adapter whose modules do all of its work, as LoRA's do, got {kinds}")


def _check_scales(what: str, config: Any) -> None:
    """Raises ValueError for a scale of a LoRA that is not finite: JSON can hold NaN and Infinity."""
    patterns = getattr(config, "alpha_pattern", None)
    scales = [("lora_alpha", getattr(config, "lora_alpha", 1))]
    scales += [(f"alpha_pattern[{name!r:.60}]", value) for name, value in (patterns or {}).items()]
    for name, value in scales:
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{what}: {name}={value!r:.60}: expected a finite number")


def _check_initialisation(what: str, config: Any) -> None:
    """Raises ValueError for an initialisation that changed the base's weights and that loading does not repeat.

    Such initialisations depend on random numbers, gradients or activations.
    """
    how = getattr(config, "init_lora_weights", True)
    if how not in INITS_KEEPING_BASE and str(how).lower() not in REPEATED_INITS:
        known = ", ".join(map(repr, (*INITS_KEEPING_BASE, *REPEATED_INITS)))
        raise ValueError(
            f"{what}: init_lora_weights={how!r:.60}: expected one of {known}. If it changed the base as training began,"
            " convert the adapter: PEFT's save_pretrained(path_initial_model_for_weight_conversion=...). If this base"
            " has been changed likewise, write true there"
        )


def _not_loaded(adapted: nn.Module, names: Iterable[str]) -> list[str]:
    """Return those names whose parameter was not loaded under another name either. VB-LoRA's bank has several names."""
    missing = set(names)
    parameters = dict(adapted.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in parameters.items() if name not in missing}
    return [name for name in missing if id(parameters.get(name)) not in loaded]


def is_adapted(model: nn.Module) -> bool:
    """Whether PEFT has put layers of its own into a model."""
    return any(type(module).__module__.startswith("peft.") for module in model.modules())


def listed_names(names: Iterable[str]) -> str:
    """Return the first MAX_LISTED_NAMES names in order, and the number of the others."""
    ordered = sorted(names)
    more = f" and {len(ordered) - MAX_LISTED_NAMES} more" if len(ordered) > MAX_LISTED_NAMES else ""
    return ", ".join(ordered[:MAX_LISTED_NAMES]) + more


def checked_config(what: str, source: Source) -> Any:
    """Return the adapter's PEFT config, checked.

    Raises:
        ValueError: a kind or a setting that is not supported, or that this version of PEFT does not know.
    """
    config = _config(what, source)
    check_kind(what, config)
    _check_scales(what, config)
    _check_initialisation(what, config)
    return config


def _config(what: str, source: Source) -> Any:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    values = read_object(what, source, "adapter_config.json")
    kinds = {plain(kind): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = values.get("peft_type")
    if kind not in kinds:
        raise ValueError(f"{what}: peft_type={kind!r}: expected one that PEFT knows: {', '.join(sorted(kinds))}")
    known = {field.name for field in fields(kinds[kind])}
    for field in fields(kinds[kind]):
        value = values.get(field.name, field.default)
        if field.type in (bool, "bool") and not isinstance(value, bool | None):  # the text "false" would count as true
            raise ValueError(f"{what}: {field.name}={value!r:.60}: expected true or false")
    for name, value in values.items():
        if name not in known and value:
            raise ValueError(f"{what}: {name}={value!r:.60}: expected no such setting; a newer PEFT may know it")
    with refusing(what, f"an adapter_config.json of {kind}"):
        return kinds[kind](**{name: value for name, value in values.items() if name in known})


def _check_vocabulary(what: str, base: Any, saved: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError for embeddings of more or fewer tokens than the base's, as after training with added tokens."""
    vocabularies = [
        module for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module is not None
    ]
    ends = {name.rpartition(".")[2]: module for name, module in base.named_modules() if module in vocabularies}
    for name, tensor in saved.items():
        parts = name.split(".")
        module = next((ends[part] for part in parts if part in ends), None)
        if module is None or parts[-1] != "weight" or tensor.dim() != 2 or any("lora" in part for part in parts):
            continue
        if len(tensor) != (rows := len(module.weight)):
            raise ValueError(
                f"{what}: {name} has {len(tensor)} rows, the base {rows}: expected the same. If it was trained with"
                " added tokens, resize the base's embeddings as then, save it with that tokenizer, and use that base"
            )


def _no_numbers_to_overwrite(config: Any) -> AbstractContextManager[None]:
    """Skip PEFT's initial weights if the adapter's file provides all of them. They take 0.1 s for 210 matrices."""
    lora = plain(config.peft_type) == "LORA" and config.init_lora_weights in INITS_KEEPING_BASE and not config.use_dora
    return no_init_weights() if lora else nullcontext()


def _rewritten(tree: nn.Module, config: Any, saved: Mapping[str, torch.Tensor]) -> set[int]:
    """Return ids of the parameters that PEFT will write to.

    These are biases or embeddings that were trained too, or all parameters that the adapter's initialisation changes.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    written: set[int] = set()
    parameters = dict(tree.named_parameters())
    for name, value in saved.items():
        old = parameters.get(name.removeprefix("base_model.model.").replace(".base_layer.", "."))
        if old is not None and not (old.shape == value.shape and torch.equal(old, value.to(old))):
            written.add(id(old))
    kind = plain(config.peft_type)
    if kind not in KINDS_KEEPING_BASE:
        return {id(parameter) for parameter in tree.parameters()}
    if kind == "LORA" and config.init_lora_weights not in INITS_KEEPING_BASE:
        for name, module in tree.named_modules():
            if check_target_module_exists(config, name):
                written.update(id(parameter) for parameter in module.parameters())
    return written


def plain(value: Any) -> Any:
    """Return the text of an adapter kind or a task, which PEFT holds as an enum."""
    return value.value if isinstance(value, Enum) else value
