"""transformers' Trainer with the ARM loss, pair batches, pair metrics and checkpoints that survive a kill."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from .batches import Collator, PairBatches
from .config import TrainConfig
from .encode import Encoded
from .metrics import PairStats, pair_losses
from .model import PairModel

COMPLETE = "complete.json"  # written last: a checkpoint without it was cut off by a kill
WEIGHTS = "trained.safetensors"


class ArmTrainer(Trainer):
    """Minimises −log σ(β_r · margin), averaged over all pairs of a step whatever the micro-batches' sizes."""

    def __init__(
        self,
        config: TrainConfig,
        model: PairModel,
        train: list[Encoded],
        evaluation: list[Encoded],
        collator: Collator,
        **kwargs: Any,
    ) -> None:
        self.config = config
        self.pair_batches = PairBatches(
            [pair.tokens for pair in train], size=config.micro_batch_size, epochs=config.epochs, seed=config.seed
        )
        self.tokens_seen = 0
        self.seconds = 0.0
        self.recent = PairStats(config.beta)
        super().__init__(model=model, train_dataset=train, eval_dataset=evaluation, data_collator=collator, **kwargs)  # type: ignore[arg-type]

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(self.train_dataset, batch_sampler=self.pair_batches, collate_fn=self.data_collator)  # type: ignore[arg-type]
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(len(batch["targets"]) // 2 for batch in batches)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.tokens_seen += int(inputs.pop("tokens").sum())
        logps = model(**inputs)
        self.recent.add(logps.detach(), (inputs["targets"] >= 0).sum(-1))
        loss = pair_losses(logps, self.config.beta).sum() / num_items_in_batch
        return (loss, logps) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            recent, self.recent = self.recent.summary(), PairStats(self.config.beta)
            logs |= {f"train_{name}": recent[name] for name in ("accuracy", "margin_mean") if name in recent}
            logs["tokens_per_second"] = self.tokens_seen / max(self.seconds, 1e-9)
        super().log(logs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of held-out pairs, each named with the prefix."""
        stats = self.pair_stats(self.eval_dataset if eval_dataset is None else eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in stats.summary().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def pair_stats(self, pairs: list[Encoded]) -> PairStats:
        """Rewards of pairs, in evaluation mode and without gradients. The longest come first: memory fails early."""
        stats = PairStats(self.config.beta)
        training = self.model.training
        self.model.eval()
        ordered = sorted(pairs, key=lambda pair: -pair.tokens)
        size = self.config.micro_batch_size
        with torch.no_grad():
            for i in range(0, len(ordered), size):
                batch = self._prepare_inputs(self.data_collator(ordered[i : i + size]))
                del batch["tokens"]
                stats.add(self.model(**batch), (batch["targets"] >= 0).sum(-1))
        self.model.train(training)
        return stats

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        write_json(folder / COMPLETE, {"step": self.state.global_step})

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {n: p.detach().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}
        save_file(trained, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = load_file(Path(resume_from_checkpoint, WEIGHTS), device=str(self.args.device))
        with torch.no_grad():
            parameters = dict((model or self.model).named_parameters())
            for name, value in weights.items():
                parameters[name].copy_(value)


def training_arguments(config: TrainConfig, dtype: torch.dtype, pairs: int, progress: bool) -> TrainingArguments:
    """The Trainer's own options. `output_dir` holds nothing but checkpoints."""
    return TrainingArguments(
        output_dir=str(checkpoints(config)),
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
        max_steps=steps(config, pairs),
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        optim=config.optimizer,
        max_grad_norm=config.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        seed=config.seed,
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_strategy="steps" if config.checkpoint_every else "no",
        save_steps=config.checkpoint_every or 500,
        save_total_limit=2,
        disable_tqdm=not progress,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def steps(config: TrainConfig, pairs: int) -> int:
    """Optimiser steps of a run."""
    batches = max(1, round(config.epochs * math.ceil(pairs / config.micro_batch_size)))
    return math.ceil(batches / (config.batch_size // config.micro_batch_size))


def checkpoints(config: TrainConfig) -> Path:
    return config.folder / "checkpoints"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; those that a kill cut off are removed."""
    found = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).is_file():
            found.append((int(path.name.rpartition("-")[2]), path))
        else:
            shutil.rmtree(path)
    return max(found)[1] if found else None


def write_json(path: Path, value: Any) -> None:
    """Written whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
