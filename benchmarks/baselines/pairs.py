"""Preference pairs in TRL's format, split into training and held-out rows like those of the ARMs' own training."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from genarm_fast.text.transcripts import transcript_messages
from genarm_fast.train.data import Pair, load_pairs

# The settings of scripts/demo_arms/train_arms.py, which trains the ARMs: every method trains under the same settings.
RANK, ALPHA, LEARNING_RATE, BATCH = 4, 8, 5e-4, 16


def render(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> str:
    """Return a prompt's text in the chat template. A plain string is a transcript, or else one message of the user."""
    if isinstance(prompt, str):
        prompt = transcript_messages(prompt) or [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))


def split(path: str | Path, every: int) -> tuple[list[Pair], list[Pair]]:
    """Return (training pairs, held-out pairs). The held-out ones are rows 0, every, 2 · every, ... of the file."""
    pairs = load_pairs(str(path)).pairs
    return [pair for pair in pairs if pair.row % every], [pair for pair in pairs if pair.row % every == 0]


def dataset(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return a dataset with the text columns prompt, chosen and rejected. TRL appends EOS to both responses."""
    rows = [
        {"prompt": render(tokenizer, p.prompt), "chosen": str(p.chosen).strip(), "rejected": str(p.rejected).strip()}
        for p in pairs
    ]
    return Dataset.from_list(rows)


def lora(task: str, **more: Any) -> LoraConfig:
    """Return the configuration of the ARMs' LoRA: every linear layer except the output layer."""
    return LoraConfig(task_type=task, r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", **more)


def training_arguments(output: Path, micro_batch: int, epochs: float, batch: int = BATCH) -> dict[str, Any]:
    """Return options for any of TRL's trainers, equal to those of the ARMs' training. batch: pairs per step."""
    if batch % micro_batch:
        raise ValueError(f"batch={batch}: expected a multiple of micro_batch={micro_batch}")
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": batch // micro_batch,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
        "num_train_epochs": epochs,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not torch.accelerator.is_available(),  # without it transformers refuses bfloat16 on a CPU
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
    }


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all trainings on pairs share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="model folder or hub id")
    parser.add_argument("pairs", type=Path, help="preference pairs, as `genarm-fast train` reads them")
    parser.add_argument("output", type=Path, help="folder for the adapter")
    parser.add_argument("--holdout-every", type=int, default=10, help="rows 0, n, 2n, ... are held out (default: 10)")
    parser.add_argument("--max-pairs", type=int, help="train on so many, drawn at random (default: all)")
    parser.add_argument("--held-out-pairs", type=int, help="measure on the first so many (default: all)")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--micro-batch", type=int, default=4, help="pairs a forward (default: 4)")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"pairs a step (default: {BATCH}, as of the ARMs)")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help=f"default: {LEARNING_RATE:g}")
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16; weights stay in float32")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def chosen_pairs(pairs: list[Pair], most: int | None) -> list[Pair]:
    """Return at most `most` of the pairs, drawn at random with a fixed seed; all of them if `most` is None."""
    return pairs if most is None or most >= len(pairs) else random.Random(0).sample(pairs, most)
