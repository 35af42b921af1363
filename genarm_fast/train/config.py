"""Everything a training run is told, checked before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

# Fields that can change between an interrupted run and its continuation without changing the trained weights.
OPERATIONAL = frozenset(
    {
        "output",
        "base_id",
        "data_id",
        "checkpoint_every",
        "eval_every",
        "eval_pairs",
        "log_every",
        "resume",
        "save_dtype",
    }
)


def option(default: Any, help: str) -> Any:
    """A field whose description is also the command line's."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of `train`. Lengths are in tokens, `batch_size` in pairs per optimiser step.

    Raises ValueError or TypeError, naming field, value and expectation.
    """

    base: str = option("", "model that the ARM starts from: hub id or folder")
    data: str = option("", "preference pairs: .jsonl, .jsonl.gz or a `datasets` id")
    output: str = option("", "folder that the ARM is written to")
    base_id: str | None = option(None, "name of the base to record in the ARM, if `base` is a local path")
    data_id: str | None = option(None, "name of the data to record in the ARM")
    dataset_split: str = option("train", "split, if `data` is a `datasets` id")

    as_chat: bool = option(False, "turn text prompts and HH transcripts into chat messages")
    prompt_template: str | None = option(None, "wraps text prompts, e.g. '<|user|>\\n{prompt}\\n<|assistant|>\\n'")
    chat_template: str | None = option(None, "Jinja chat template; default: the tokenizer's")
    max_prompt_tokens: int = option(512, "longest prompt")
    max_response_tokens: int = option(512, "longest response with its EOS; pairs over it are dropped, never cut")
    long_prompts: Literal["drop", "truncate"] = option("drop", "longer prompts: drop the pair, or cut on the left")
    holdout_every: int | None = option(None, "hold out rows 0, n, 2n, ... (counted from 0)")
    holdout_fraction: float = option(0.05, "share of prompts to hold out, by hash of their text, if not by rows")
    eval_data: str | None = option(None, "held-out pairs from another file instead")
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
    weight_decay: float = option(0.05, "AdamW weight decay")
    optimizer: str = option("adamw_torch", "any optimiser name of transformers' Trainer")
    max_grad_norm: float = option(1.0, "gradient clipping; 0 is off")
    epochs: float = option(1.0, "passes over the training pairs")
    batch_size: int = option(32, "pairs per optimiser step")
    micro_batch_size: int = option(4, "pairs per forward pass; must divide batch_size")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "precision; auto: bfloat16 on a GPU that has it, on a CPU what multiplies faster"
    )
    attn_implementation: str = option("sdpa", "attention of transformers: sdpa, eager, flash_attention_2, ...")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, a third more time")
    seed: int = option(0, "seed of data order, initialisation and dropout")

    eval_every: int = option(50, "steps between evaluations on held-out pairs; 0: only at start and end")
    eval_pairs: int = option(256, "at most so many pairs in those; the last one takes all; 0: all")
    checkpoint_every: int = option(50, "steps between checkpoints; 0 is off")
    log_every: int = option(5, "steps between logged losses")
    resume: Literal["auto", "never"] = option("auto", "continue an interrupted run in `output`, or refuse")
    save_dtype: Literal["float32", "bfloat16", "float16"] = option("bfloat16", "precision of the written weights")

    def __post_init__(self) -> None:
        for name in ("base", "data", "output"):
            self._need(name, bool(getattr(self, name)), "a non-empty string")
        for f in fields(self):
            if str(f.type).startswith("Literal["):
                allowed = [part.strip().strip("'\"") for part in str(f.type)[8:-1].split(",")]
                self._need(f.name, getattr(self, f.name) in allowed, f"one of {', '.join(allowed)}")
        for name in (
            "max_prompt_tokens",
            "max_response_tokens",
            "lora_rank",
            "batch_size",
            "micro_batch_size",
            "log_every",
        ):
            self._need(name, _is_int(getattr(self, name)) and getattr(self, name) >= 1, "an integer of at least 1")
        for name in ("eval_every", "eval_pairs", "checkpoint_every", "seed"):
            self._need(name, _is_int(getattr(self, name)) and getattr(self, name) >= 0, "an integer of at least 0")
        for name in ("holdout_every", "max_pairs"):
            value = getattr(self, name)
            self._need(name, value is None or (_is_int(value) and value >= 2), "an integer of at least 2, or None")
        for name in ("beta", "learning_rate", "epochs", "lora_alpha"):
            self._need(name, _is_number(getattr(self, name)) and getattr(self, name) > 0, "a finite number above 0")
        for name in ("warmup", "weight_decay", "max_grad_norm"):
            self._need(
                name, _is_number(getattr(self, name)) and getattr(self, name) >= 0, "a finite number of at least 0"
            )
        for name in ("lora_dropout", "holdout_fraction"):
            self._need(name, _is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        self._need(
            "batch_size",
            self.batch_size % self.micro_batch_size == 0,
            f"a multiple of micro_batch_size={self.micro_batch_size}",
        )
        template = self.prompt_template
        self._need("prompt_template", template is None or "{prompt}" in template, "a text with {prompt} in it")
        self._need("as_chat", not (self.as_chat and template), "False when prompt_template is given")
        if isinstance(self.lora_targets, str):
            raise TypeError(f"lora_targets={self.lora_targets!r}: expected a sequence of names")

    def _need(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")

    @property
    def folder(self) -> Path:
        return Path(self.output)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
