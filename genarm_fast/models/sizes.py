"""Whether a model is as large as its files: no memory is taken for one that only its config speaks of."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from genarm_fast.models.files import refusing, weight_bytes
from genarm_fast.models.hub import CONFIGS, Source, find_file, hub_options

MOST_LAYERS = 10_000  # the deepest of the hub have 126
MOST_NUMBERS = 1 << 43  # of a model whose weights are not here yet; the largest of the hub have 2^40
PER_BYTE = 4  # numbers that a byte of weights can hold, at 2 bits each
SHOWN = 3  # folders in an error
SLACK = 1 << 20  # numbers beside those, such as tables that a model computes


def check_size(member: str, source: Source, *, trust_remote_code: bool) -> None:
    """Builds the model without memory for its weights, and counts them: 40 ms of CPU time for 30 layers.

    Raises:
        ValueError: a config that no model can be built from, or one of more numbers than the files hold.
    """
    local = os.path.isdir(source)
    if not local and find_file(source, "config.json") is None:
        return  # loading says what the repository lacks
    what = f"{member}: {Path(source, 'config.json')}" if local else f"{member}={os.fspath(source)!r}"
    if local and find_file(source, "config.json") is None:
        inside = sorted(
            path.name for path in Path(source).iterdir() if any((path / name).is_file() for name in CONFIGS)
        )
        meant = f"; is {' or '.join(inside[:SHOWN])} in it meant?" if inside else ""
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
    most = PER_BYTE * bytes + SLACK if bytes else MOST_NUMBERS
    if numbers > most:
        raise ValueError(
            f"{what}: a model of {numbers} numbers: expected at most {most}, as its files have {bytes} bytes"
        )
