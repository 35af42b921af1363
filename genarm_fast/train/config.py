"""All options of a training run, checked before any work."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from genarm_fast.text.chats import template_arguments

# A run can be continued with other values of these options: the trained weights stay the same.
OPERATIONAL = frozenset(
    {
        "output",
        "base_id",
        "data_id",
        "eval_every",
        "eval_pairs",
        "checkpoint_every",
        "log_every",
        "report_to",
        "resume",
        "save_dtype",
        "trust_remote_code",
    }
)
AT_LEAST = {  # smallest values of the integers
    **dict.fromkeys(("max_prompt_tokens", "max_response_tokens", "lora_rank", "max_pairs"), 1),
    **dict.fromkeys(("batch_size", "micro_batch_size", "log_every"), 1),
    **dict.fromkeys(("eval_every", "eval_pairs", "checkpoint_every", "seed"), 0),
    "holdout_every": 2,
}
POSITIVE = ("beta", "learning_rate", "epochs", "lora_alpha")
NOT_NEGATIVE = ("warmup", "weight_decay", "max_grad_norm")
COLUMNS = ("prompt", "chosen", "rejected", "response_0", "response_1", "tools", "chat_template_kwargs")
BELOW_ONE = ("lora_dropout", "holdout_fraction")


def option(default: Any, help: str) -> Any:
    """Return a field with a description that the command line shows too."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of `train`. Lengths are in tokens, `batch_size` in pairs per optimiser step.

    Raises:
        TypeError, ValueError: naming the field, its value and what was expected.
    """

    base: str = option("", "model that the ARM starts from: hub id or folder")
    data: str = option("", "preference pairs: .jsonl, .jsonl.gz, or a `datasets` id or folder (of save_to_disk, too)")
    output: str = option("", "folder that the ARM is written to")
    base_id: str | None = option(None, "name of the base to record in the ARM, if `base` is a local path")
    data_id: str | None = option(None, "name of the data to record in the ARM")
    dataset_split: str = option("train", "split, if `data` is a `datasets` id")
    dataset_config: str | None = option(None, "configuration, if `data` is a `datasets` id that has several")
    dataset_dir: str | None = option(None, "folder in it, e.g. harmless-base of Anthropic/hh-rlhf")

    columns: tuple[str, ...] = option((), "names of columns that the data has otherwise, e.g. prompt=question")
    chosen_by: str | None = option(
        None, "column that says which of response_0 and response_1 is chosen, e.g. safer_response_id"
    )
    on_bad_row: Literal["error", "drop"] = option("error", "a malformed row: stop, or drop and count it")

    trust_remote_code: bool = option(False, "run Python code that the base's folder or repository brings along")

    as_chat: bool = option(False, "turn text prompts and HH transcripts into chat messages")
    prompt_template: str | None = option(None, "wraps text prompts, e.g. '<|user|>\\n{prompt}\\n<|assistant|>\\n'")
    chat_template: str | None = option(None, "Jinja chat template; default: the tokenizer's")
    chat_template_kwargs: Mapping[str, Any] | None = option(
        None, "what the chat template gets with rows that don't say so themselves, e.g. '{\"enable_thinking\": false}'"
    )
    max_prompt_tokens: int = option(512, "longest prompt")
    max_response_tokens: int = option(512, "longest response with its EOS; pairs over it are dropped, never cut")
    long_prompts: Literal["drop", "truncate"] = option("drop", "longer prompts: drop the pair, or cut on the left")
    holdout_every: int | None = option(None, "hold out rows 0, n, 2n, ... (counted from 0)")
    holdout_fraction: float = option(0.05, "else: share of prompts to hold out, by hash of their text")
    eval_data: str | None = option(None, "else: held-out pairs from another file; all of `data` is trained on")
    max_pairs: int | None = option(None, "train on a random sample of so many pairs")

    beta: float = option(0.05, "β_r of the loss")
    method: Literal["lora", "full"] = option("lora", "train LoRA matrices or all weights")
    lora_rank: int = option(8, "rank of the LoRA")
    lora_alpha: float = option(16.0, "scale of the LoRA is alpha / rank")
    lora_dropout: float = option(0.05, "dropout before the LoRA matrices")
    lora_targets: tuple[str, ...] = option((), "names of linear modules; default: all but the output layer")
    learning_rate: float = option(5e-4, "peak learning rate")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = option("cosine", "learning rate after the warmup")
    warmup: float = option(0.1, "linear warmup: share of all steps if below 1, else steps")
    weight_decay: float = option(0.05, "weight decay")
    optimizer: str = option("adamw_torch", "any optimiser name of transformers' Trainer")
    max_grad_norm: float = option(1.0, "gradient clipping; 0 is off")
    epochs: float = option(1.0, "passes over the training pairs")
    batch_size: int = option(32, "pairs per optimiser step")
    micro_batch_size: int = option(4, "pairs per forward pass; must divide batch_size")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "precision; auto: bfloat16 on a GPU that has it, on a CPU whichever multiplies faster"
    )
    attn_implementation: str = option("sdpa", "attention of transformers: sdpa, eager, flash_attention_2, ...")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, a third more time")
    seed: int = option(0, "seed of split, data order, initialisation and dropout")

    eval_every: int = option(50, "steps between evaluations on held-out pairs; 0: only before and after")
    eval_pairs: int = option(256, "at most so many pairs in those; 0: all")
    checkpoint_every: int = option(50, "steps between checkpoints; 0: none")
    log_every: int = option(5, "steps between logged losses")
    report_to: tuple[str, ...] = option((), "where else to log to, as of transformers: tensorboard, wandb, mlflow, ...")
    resume: Literal["auto", "never"] = option("auto", "continue an interrupted run in `output`, or refuse to")
    save_dtype: Literal["float32", "bfloat16", "float16"] = option("bfloat16", "precision of the written weights")

    def __post_init__(self) -> None:
        for name, hint in hints().items():
            self._check_type(name, hint)
        for name in ("base", "output"):
            self._need(name, bool(getattr(self, name)), "a non-empty string")
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            self._need(name, value is None or value >= least, f"at least {least}")
        self._need("seed", self.seed < 2**32, "less than 2**32")  # NumPy's limit
        for name in POSITIVE:
            self._need(name, getattr(self, name) > 0, "a number above 0")
        for name in NOT_NEGATIVE:
            self._need(name, getattr(self, name) >= 0, "a number of at least 0")
        for name in BELOW_ONE:
            self._need(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        per_pass = self.micro_batch_size
        self._need("batch_size", self.batch_size % per_pass == 0, f"a multiple of micro_batch_size={per_pass}")
        self._need(
            "holdout_every", self.holdout_every is None or self.eval_data is None, "None when eval_data is given"
        )
        self._need("lora_targets", self.method == "lora" or not self.lora_targets, "none with method='full'")
        for each in self.columns:
            name, sign, _ = each.partition("=")
            self._need("columns", bool(sign) and name in COLUMNS, f"NAME=COLUMN each, NAME of {', '.join(COLUMNS)}")
        names = [each.partition("=")[0] for each in self.columns]
        self._need("columns", len(set(names)) == len(names), "each NAME once")
        template = self.prompt_template
        self._need("prompt_template", template is None or "{prompt}" in template, "a text with {prompt} in it")
        template = self.chat_template
        self._need("chat_template", template is None or "{" in template, "the text of a Jinja template")
        template_arguments(None, self.chat_template_kwargs)
        self._need("as_chat", not (self.as_chat and self.prompt_template), "False when prompt_template is given")

    @property
    def folder(self) -> Path:
        return Path(self.output)

    def _check_type(self, name: str, hint: Any) -> None:
        value = getattr(self, name)
        if get_origin(hint) is Literal:
            self._need(name, value in get_args(hint), f"one of {', '.join(get_args(hint))}")
            return
        mapping = any(get_origin(each) is Mapping for each in get_args(hint))
        if mapping:
            ok = value is None or (isinstance(value, Mapping) and _is_json(value))
        elif get_origin(hint) is tuple:
            ok = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
        else:
            kinds = get_args(hint) or (hint,)
            ok = isinstance(value, (*kinds, int) if float in kinds else kinds)
            ok = ok and (not isinstance(value, bool) or bool in kinds)
        if not ok:
            if mapping:
                raise TypeError(f"{name}={value!r:.80}: expected a mapping that JSON can hold, or None")
            expected = getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)
            raise TypeError(f"{name}={value!r}: expected {expected}")
        self._need(name, not isinstance(value, float) or math.isfinite(value), "a finite number")

    def _need(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")


def _is_json(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        return False


@cache
def hints() -> dict[str, Any]:
    """Return the evaluated type of each field."""
    return get_type_hints(TrainConfig)


def scalar_type(hint: Any) -> type:
    """Return int, float or str for a hint such as `int | None`."""
    return next(kind for kind in get_args(hint) or (hint,) if kind is not NoneType)


def defaults() -> dict[str, Any]:
    return {f.name: f.default for f in fields(TrainConfig)}
