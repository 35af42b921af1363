"""Checks of a training before any weights are read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig, Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.training_args import OptimizerNames

from genarm_fast.models.checkpoint_fingerprint import checkpoint_fingerprint
from genarm_fast.models.files import refusing
from genarm_fast.models.hub import Source
from genarm_fast.models.support import check_supported
from genarm_fast.train import processes
from genarm_fast.train.config import TrainConfig

Rows = Iterable[Mapping[str, Any]]
# In the names of variables that `accelerate launch` sets.
SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")


def check_call(config: TrainConfig, data: Rows | None, eval_data: Rows | None) -> None:
    """Raises ValueError for options that conflict with each other, the number of processes, or what is installed."""
    for name, rows in (("data", data), ("eval_data", eval_data)):
        if rows is not None and getattr(config, name):
            raise ValueError(f"{name}={getattr(config, name)!r}: expected none in the config where rows are given")
    if data is None and not config.data:
        raise ValueError("data='': expected a non-empty string, or rows given to `train`")
    if data is not None or Path(config.data).is_file():  # only a `datasets` id or folder has these options
        where = "rows" if data is not None else "a file"
        for name, usual in (("dataset_split", "train"), ("dataset_config", None), ("dataset_dir", None)):
            if (value := getattr(config, name)) != usual and config.eval_data is None:
                raise ValueError(f"{name}={value!r}: expected none, the data is {where}")
    if eval_data is not None and config.holdout_every is not None:
        raise ValueError(f"holdout_every={config.holdout_every}: expected None when eval_data is given")
    at_once = config.micro_batch_size * processes.count()
    if config.batch_size % at_once:
        raise ValueError(
            f"batch_size={config.batch_size}: expected a multiple of {at_once}: "
            f"micro_batch_size={config.micro_batch_size} times {processes.count()} processes"
        )
    for name in (f"ACCELERATE_USE_{way}" for way in SHARDING):
        if os.environ.get(name, "false").lower() in ("1", "true", "yes", "on"):
            raise ValueError(
                f"{name}={os.environ[name]}: expected plain data parallelism: checkpoints and the finished ARM are "
                "written by one process, which has all weights"
            )
    if config.optimizer not in (names := [name.value for name in OptimizerNames]):
        raise ValueError(f"optimizer={config.optimizer!r}: expected one of {', '.join(names)}")
    found = get_available_reporting_integrations()
    missing = sorted(set(config.report_to) - set(found))
    if missing and config.report_to not in (("none",), ("all",)):  # words that transformers takes
        raise ValueError(
            f"report_to={config.report_to!r}: {missing[0]!r} is unknown to transformers or not installed: "
            f"expected none, all, or some of {', '.join(found) or 'those that are installed, of which there is none'}"
        )


def check_optimizer(config: TrainConfig) -> None:
    """Raises ValueError for an optimiser whose package is missing, or that needs arguments that no option gives."""
    arguments = TrainingArguments(output_dir=str(config.folder), optim=config.optimizer, report_to="none")
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError) as error:
        raise ValueError(f"optimizer={config.optimizer!r}: expected one that can be used here: {error}") from error


def check_same_base(config: TrainConfig, location: Source, report: Mapping[str, Any]) -> None:
    """Raises ValueError if a finished run had another base, as far as the base's files tell without loading it."""
    # float16 weights have another fingerprint.
    rounded = report["dtype"] == "float16" and config.method == "lora"
    found = None if rounded or config.trust_remote_code else checkpoint_fingerprint(location)
    if found is not None and report["base_fingerprint"] not in (None, found):
        raise ValueError(f"base={config.base!r}: expected the weights that the run in {config.output!r} began with")


def check_servable(config: TrainConfig, location: Source) -> None:
    """Raises ValueError for a kind of model that the engine can't decode with, before any weights are read."""
    with refusing(f"base={config.base!r}", "a folder or a hub id with a model and its tokenizer"):
        found = AutoConfig.from_pretrained(location, trust_remote_code=config.trust_remote_code)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(found), None)
    # A model with Python code of its own is checked once it is loaded.
    if kind is not None:
        check_supported("base", kind, found)


def stop_ids(config: TrainConfig, location: Source) -> frozenset[int]:
    """Return the tokens that end a response in decoding as well (`models.vocabulary.end_of_sequence`)."""
    try:
        eos = GenerationConfig.from_pretrained(location, trust_remote_code=config.trust_remote_code).eos_token_id
    except OSError:  # the model has no generation config
        eos = None
    if eos is None:
        eos = (
            AutoConfig.from_pretrained(location, trust_remote_code=config.trust_remote_code)
            .get_text_config()
            .eos_token_id
        )
    return frozenset([eos] if isinstance(eos, int) else eos or ())
