"""Load the causal LM of a folder or hub repository with transformers, or refuse it if its weights do not fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.utils import logging

from genarm_fast.kernels.quant_linear import QuantWeight
from genarm_fast.models import coded_checkpoint
from genarm_fast.models.adapter import listed_names
from genarm_fast.models.files import check_files, refusing
from genarm_fast.models.hub import Source
from genarm_fast.models.one_load import one_load
from genarm_fast.models.sizes import check_size

CONSTANT_NAME_ENDINGS = (".masked_bias",)  # ends of names that old versions of transformers saved beside the weights


@one_load()
def load_causal_lm(member: str, source: Source, *, trust_remote_code: bool = False, **kwargs: Any) -> Any:
    """Load the causal LM of a folder or hub repository, if that holds all of the model's weights and no others.

    member: the model's role, named in errors. kwargs: keyword arguments for transformers' `from_pretrained`.

    Raises:
        ValueError: files that cannot be read, Python code of the folder's own without `trust_remote_code`, and weights
            that are missing, that have no place in the model, or that have another shape.
    """
    check_files(member, source)
    kind = AutoModelForCausalLM
    if not kwargs.keys() & {"gguf_file", "config"}:  # either argument replaces the folder's config.json
        kind = check_size(member, source, trust_remote_code=trust_remote_code)
    loading = {**kwargs, "trust_remote_code": trust_remote_code}
    return _load(f"{member}={os.fspath(source)!r}", str(source), loading, kind)


def load_coded(
    member: str, source: Source, coded_config: dict[str, Any], *, trust_remote_code: bool = False, **kwargs: Any
) -> tuple[Any, dict[str, QuantWeight]]:
    """Load a folder whose matrices another method coded. Return the model, and the codes that `quant_linear` can hold.

    coded_config: the quantization_config of the folder's config. The model is plain: its coded matrices are
    dequantised. The codes have the names of their weights. The other arguments are those of `load_causal_lm`.

    Raises:
        ValueError: as `load_causal_lm`, and for codes, scales and zeros that do not fit together.
    """
    check_files(member, source)
    what = f"{member}={os.fspath(source)!r}"
    with refusing(what, "a folder that can be loaded"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        del config.quantization_config
        with torch.device("meta"), no_init_weights():
            kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    tensors, codes = coded_checkpoint.read(what, Path(source), coded_config)
    return _load(what, None, {**kwargs, "config": config, "state_dict": tensors}, kind), codes


def _load(what: str, source: str | None, kwargs: dict[str, Any], kind: Any) -> Any:
    with refusing(what, "a folder or a hub id that can be loaded"), _quietly():
        loaded: Any = kind.from_pretrained(
            source,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # mismatches are refused below, by name
            **kwargs,
        )
    model, found = loaded
    unexpected = () if getattr(model, "hf_quantizer", None) is not None else found["unexpected_keys"]
    problems = (
        ("lacks", found["missing_keys"]),
        ("has other shapes for", {name for name, *_ in found["mismatched_keys"]}),
        ("has no place for", {name for name in unexpected if not name.endswith(CONSTANT_NAME_ENDINGS)}),
    )
    said = "; ".join(f"{problem} {listed_names(names)}" for problem, names in problems if names)
    if said:
        kinds = ", ".join(model.config.architectures or ())
        raise ValueError(
            f"{what}: expected all weights of {type(model).__name__} and no others, it {said} (saved: {kinds})"
        )
    return model


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence transformers' table of weights that did not fit, because our error says the same."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
