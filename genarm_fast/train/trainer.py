"""transformers' Trainer with the ARM loss, pair batches, pair metrics and checkpoints that survive a kill."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from genarm_fast.train import processes
from genarm_fast.train.batches import NO_PAIR, Collator, PairBatches
from genarm_fast.train.checkpoints import checkpoints, seal
from genarm_fast.train.config import TrainConfig
from genarm_fast.train.encode import Encoded
from genarm_fast.train.files import read_json, write_json
from genarm_fast.train.metrics import PairStats, pair_losses
from genarm_fast.train.model import PairModel
from genarm_fast.train.progress import Narrator
from genarm_fast.utils.disk import resumable

WEIGHTS_FILE = "trained.safetensors"
SINCE_LOG_FILE = "since_log.json"

DIVERGED = "expected a finite number; a lower learning_rate, or dtype='float32', may help"


class ArmTrainer(Trainer):
    """Minimises −log σ(β_r · margin), averaged over all pairs of a step whatever the sizes of its micro-batches.

    Several processes take turns with the micro-batches of a step. A micro-batch's number seeds its dropout. So the
    number of processes changes only the order of sums.
    """

    model: Any
    data_collator: Any

    def __init__(
        self,
        config: TrainConfig,
        model: PairModel,
        train: list[Encoded],
        held_out: list[Encoded],
        collator: Collator,
        dtype: torch.dtype,
        bar: Progress,
        auxiliary_loss: Callable[[nn.Module, int], Tensor] | None = None,
    ) -> None:
        self.config, self.held_out, self.bar, self.auxiliary_loss = config, held_out, bar, auxiliary_loss
        lengths = [pair.tokens for pair in train]
        self.rank, self.processes = processes.rank(), processes.count()
        self.batches = PairBatches(
            lengths,
            size=config.micro_batch_size,
            epochs=config.epochs,
            seed=config.seed,
            rank=self.rank,
            processes=self.processes,
        )
        self.tokens_seen, self.pairs_seen, self.seconds, self.micro_batch = 0, 0, 0.0, 0  # counts of this process alone
        # Collected since the last log.
        self.recent, self.losses, self.logged_step = PairStats(config.beta), list[Tensor](), 0
        accumulate = config.batch_size // config.micro_batch_size // self.processes
        self.steps = math.ceil(len(self.batches) / accumulate)
        evaluate, save = bool(config.eval_every and held_out), bool(config.checkpoint_every)
        arguments = TrainingArguments(
            output_dir=str(checkpoints(config)),
            per_device_train_batch_size=config.micro_batch_size,
            gradient_accumulation_steps=accumulate,
            max_steps=self.steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.schedule,
            # With a warmup, a single step would have a learning rate of 0.
            warmup_steps=config.warmup if self.steps > 1 else 0,
            weight_decay=config.weight_decay,
            optim=config.optimizer,
            max_grad_norm=config.max_grad_norm,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            seed=config.seed,
            logging_steps=config.log_every,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            eval_strategy="steps" if evaluate else "no",
            eval_steps=config.eval_every or None,
            save_strategy="steps" if save else "no",
            save_steps=config.checkpoint_every or 1,
            save_total_limit=2,
            disable_tqdm=True,
            report_to=list(config.report_to) or "none",
            # A step may, for example, send no token to some experts.
            ddp_find_unused_parameters=config.method == "full",
            remove_unused_columns=False,
            use_cpu=not torch.accelerator.is_available(),  # otherwise bf16=True would look for a GPU
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # DataParallel would split a batch across its pairs
        evaluated = sample(held_out, config.eval_pairs or None, config.seed)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=[*train, NO_PAIR],
            eval_dataset=evaluated or None,
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(Narrator(bar))

    def get_train_dataloader(self) -> DataLoader:
        # `accelerator.prepare` is not used: it would distribute the batches among processes a second time.
        return DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator)  # type: ignore[arg-type]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(processes.all_gather([int((batch["tokens"] > 0).sum()) for batch in batches]))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        # The last steps may have come after the last logged loss.
        if not all(bool(p.isfinite().all()) for p in self.model.parameters() if p.requires_grad):
            raise FloatingPointError(f"a trained weight is not finite at step {self.state.global_step}: {DIVERGED}")
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.detach() / self.processes)
        self.seconds += time.perf_counter() - start
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        tokens, margins = inputs.pop("tokens"), inputs.pop("margins")
        accumulate = self.args.gradient_accumulation_steps
        step, turn = self.state.global_step, self.micro_batch % accumulate
        # Its number among the micro-batches of all processes.
        number = (step * accumulate + turn) * self.processes + self.rank
        self.micro_batch += 1
        torch.manual_seed((self.config.seed << 31) + number)
        logps = model(**inputs)
        # A batch without pairs. Take part anyway, because the other processes wait for this one's gradients.
        if not tokens.any():
            return (logps.sum() * 0.0, logps) if return_outputs else logps.sum() * 0.0
        self.tokens_seen, self.pairs_seen = self.tokens_seen + int(tokens.sum()), self.pairs_seen + len(tokens)
        self.recent.add(logps.detach(), (inputs["targets"] >= 0).sum(-1), margins)
        loss = pair_losses(logps, self.config.beta, margins).sum() / num_items_in_batch
        if self.auxiliary_loss is not None:
            loss = loss + self.auxiliary_loss(self.model.lm, number) * (len(tokens) / num_items_in_batch)
        loss = loss * self.processes  # gradients are averaged over the processes
        return (loss, logps) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            steps = self.state.global_step - self.logged_step
            # transformers' own loss leaves out the steps before a resume.
            logs["loss"] = math.fsum(processes.all_gather([loss.item() for loss in self.losses])) / max(1, steps)
            self.losses, self.logged_step = [], self.state.global_step
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(f"the loss is {logs['loss']} at step {self.state.global_step}: {DIVERGED}")
            recent = PairStats.of_rows(self.config.beta, processes.all_gather(self.recent.rows())).summary()
            self.recent = PairStats(self.config.beta)
            logs |= {f"train_{name}": recent[name] for name in ("accuracy", "margin_mean")}
            logs |= self.speed()
        super().log(logs, *args, **kwargs)

    def speed(self) -> dict[str, float]:
        """Return tokens and pairs per second of all processes, {} before the first step. All must call this."""
        each = processes.all_gather([(self.tokens_seen, self.pairs_seen, self.seconds)])
        tokens, pairs, seconds = (list(column) for column in zip(*each))
        if not max(seconds):
            return {}
        return {
            "tokens_per_second": sum(tokens) / max(seconds),
            "pairs_per_second": sum(pairs) / max(seconds),
        }

    def history(self) -> list[dict[str, float]]:
        """Return the log, continuations included, without entries that transformers computes for this process alone.

        Epochs are left out as well: transformers counts only one, since `PairBatches` puts all epochs into one.
        """
        logged = [entry for entry in self.state.log_history if "train_runtime" not in entry]
        return [{name: value for name, value in entry.items() if name != "epoch"} for entry in logged]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return `PairStats.summary` of held-out pairs, each name with the prefix."""
        summary = self.pair_stats(self.eval_dataset if eval_dataset is None else eval_dataset).summary()  # type: ignore[arg-type]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in summary.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def pair_stats(self, pairs: Sequence[Encoded]) -> PairStats:
        """Compute rewards and lengths of pairs, in evaluation mode."""
        rows: list[tuple[int, list[tuple[float, ...]]]] = []
        training = self.model.training
        self.model.eval()
        # The longest pairs come first, so that a lack of memory shows at once.
        ordered = sorted(pairs, key=lambda pair: -pair.tokens)
        task = self.bar.add_task("evaluating", total=len(pairs))
        with torch.no_grad():
            size = self.config.micro_batch_size
            for i in range(self.rank * size, len(ordered), self.processes * size):
                batch = self._prepare_inputs(self.data_collator(ordered[i : i + size]))
                self.bar.advance(task, len(batch.pop("tokens")) * self.processes)
                margins, stats = batch.pop("margins"), PairStats(self.config.beta)
                stats.add(self.model(**batch), (batch["targets"] >= 0).sum(-1), margins)
                rows.append((i, stats.rows()))
        self.bar.remove_task(task)
        self.model.train(training)
        in_order = sorted(processes.all_gather(rows), key=lambda part: part[0])
        return PairStats.of_rows(self.config.beta, [row for _, part in in_order for row in part])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = checkpoints(self.config) / f"checkpoint-{self.state.global_step}"
        with resumable(folder):
            super()._save_checkpoint(model, trial)
            losses = processes.all_gather([loss.item() for loss in self.losses])
            recent = PairStats.of_rows(self.config.beta, processes.all_gather(self.recent.rows()))
            since = {"losses": losses, "logged_step": self.logged_step, "recent": vars(recent)}
            processes.from_first(lambda: self._finish_checkpoint(folder, since))  # after all processes have written

    def _finish_checkpoint(self, folder: Path, since: dict[str, Any]) -> None:
        write_json(folder / SINCE_LOG_FILE, since)
        seal(folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or checkpoints(self.config))
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach().contiguous() for name, p in self.model.named_parameters() if p.requires_grad}
        save_file(trained, folder / WEIGHTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = load_file(Path(resume_from_checkpoint, WEIGHTS_FILE))
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)
        # A checkpoint of an older version has no such file.
        if (path := Path(resume_from_checkpoint, SINCE_LOG_FILE)).is_file():
            since = read_json(path)
            self.logged_step = since["logged_step"]
            if self.rank == 0:  # the file holds the numbers of all processes
                self.losses = [torch.tensor(loss) for loss in since["losses"]]
                self.recent = PairStats(**since["recent"])


def sample(pairs: list[Encoded], n: int | None, seed: int) -> list[Encoded]:
    """Return n pairs in their order, drawn by row: a row's draw does not depend on the other pairs."""
    if n is None or len(pairs) <= n:
        return pairs
    drawn = sorted(pairs, key=lambda pair: hashlib.sha256(f"{seed}\0{pair.row}".encode()).digest())[:n]
    return sorted(drawn, key=lambda pair: pair.row)
