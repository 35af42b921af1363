"""Check that a model is as large as its files, before memory is taken for a model that only its config describes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from genarm_fast.models.files import refusing, weight_bytes
from genarm_fast.models.hub import CONFIGS, Source, find_file, hub_options

MOST_LAYERS = 10_000  # the deepest models of the hub have 126 layers
MOST_NUMBERS = 1 << 43  # numbers of a model whose files are not here yet; the largest models of the hub have 2^40
MAX_NUMBERS_PER_BYTE = 4  # most numbers that a byte of weights holds, at 2 bits each
MAX_LISTED_FOLDERS = 3  # most folders that an error names
SLACK = 1 << 20  # numbers allowed beyond MAX_NUMBERS_PER_BYTE, such as tables that a model computes


def check_size(member: str, source: Source, *, trust_remote_code: bool) -> None:
    """Build the model without memory for its weights, and count its numbers: 40 ms of CPU time for 30 layers.

    Raises:
        ValueError: a folder without a config, a config that no model can be built from, or a model with more numbers
            than its files can hold.
    """
    local = os.path.isdir(source)
    if not local and find_file(source, "config.json") is None:
        return  # loading reports what the repository lacks
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
    if layers > MOST_LAYERS:
        raise ValueError(f"{what}: num_hidden_layers={layers}: expected at most {MOST_LAYERS}")
    with refusing(what, "a config that a causal LM can be built from"), torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    numbers = sum(weight.numel() for weight in model.parameters())
    bytes = weight_bytes(Path(source)) if local else 0
    most = MAX_NUMBERS_PER_BYTE * bytes + SLACK if bytes else MOST_NUMBERS
    if numbers > most:
        raise ValueError(
            f"{what}: a model of {numbers} numbers: expected at most {most}, as its files have {bytes} bytes"
        )
