"""Check that a model is as large as its files, before memory is taken for a model that only its config describes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.initialization import no_init_weights

from genarm_fast.models.files import refusing, weight_bytes
from genarm_fast.models.hub import CONFIGS, Source, find_file, hub_options

MOST_LAYERS = 10_000  # the deepest models of the hub have 126 layers
MOST_NUMBERS = 1 << 43  # numbers of a model whose files are not here yet; the largest models of the hub have 2^40
MAX_NUMBERS_PER_BYTE = 4  # most numbers that a byte of weights holds, at 2 bits each
MAX_LISTED_FOLDERS = 3  # most folders that an error names
SLACK = 1 << 20  # numbers allowed beyond MAX_NUMBERS_PER_BYTE, such as tables that a model computes


def check_size(member: str, source: Source, *, trust_remote_code: bool) -> Any:
    """Build the model without memory for its weights, and count its numbers: 40 ms of CPU time for 30 layers.

    Returns:
        transformers' class that loads the model: AutoModelForCausalLM or AutoModelForImageTextToText (see `kind_of`).

    Raises:
        ValueError: a folder without a config, a config that no model can be built from, or a model with more numbers
            than its files can hold.
    """
    local = os.path.isdir(source)
    if not local and find_file(source, "config.json") is None:
        return AutoModelForCausalLM  # loading reports what the repository lacks
    what = f"{member}: {Path(source, 'config.json')}" if local else f"{member}={os.fspath(source)!r}"
    if local and find_file(source, "config.json") is None:
        inside = sorted(
            path.name for path in Path(source).iterdir() if any((path / name).is_file() for name in CONFIGS)
        )
        meant = f"; is {' or '.join(inside[:MAX_LISTED_FOLDERS])} in it meant?" if inside else ""
        raise ValueError(f"{member}={os.fspath(source)!r}: expected {' or '.join(CONFIGS)} in the folder{meant}")
    with refusing(what, "a config that a causal LM can be built from"):
        config = AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code, **hub_options(source))
        layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
        kind = kind_of(config)
    if layers > MOST_LAYERS:
        raise ValueError(f"{what}: num_hidden_layers={layers}: expected at most {MOST_LAYERS}")
    with refusing(what, "a config that a causal LM can be built from"), torch.device("meta"), no_init_weights():
        model = kind.from_config(config, trust_remote_code=trust_remote_code)
    numbers = sum(weight.numel() for weight in model.parameters())
    bytes = weight_bytes(Path(source)) if local else 0
    most = MAX_NUMBERS_PER_BYTE * bytes + SLACK if bytes else MOST_NUMBERS
    if numbers > most:
        raise ValueError(
            f"{what}: a model of {numbers} numbers: expected at most {most}, as its files have {bytes} bytes"
        )
    return kind


def kind_of(config: Any) -> Any:
    """Return transformers' class that loads a model of this config for text.

    Most models that also read images (Qwen2.5-VL, Mistral 3, LLaVA) have no class among transformers' causal LMs.

    Raises:
        ValueError: transformers has neither class for the config, and the folder brings no code for a causal LM.
    """
    own = getattr(config, "auto_map", None) or {}  # code that the folder brings
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise ValueError(f"model_type={config.model_type!r}: transformers has no causal LM of that type")
