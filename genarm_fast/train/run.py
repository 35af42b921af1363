"""`train`: make a finished ARM folder from a config. A run that was killed continues."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genarm_fast.models.files import check_files
from genarm_fast.models.fingerprint import fingerprint
from genarm_fast.models.hub import Source, find_file, locate
from genarm_fast.models.loader import load_tokenizer
from genarm_fast.models.support import check_supported
from genarm_fast.train import processes
from genarm_fast.train.artifacts import save_artifacts
from genarm_fast.train.batches import Collator
from genarm_fast.train.checkpoints import checkpoints, last_checkpoint
from genarm_fast.train.checks import Rows, check_call, check_optimizer, check_same_base, check_servable, stop_ids
from genarm_fast.train.config import TrainConfig
from genarm_fast.train.data import load_pairs, loading_options, prompt_kind, split_pairs
from genarm_fast.train.encode import Encoded, Encoder
from genarm_fast.train.files import locked
from genarm_fast.train.folder import RunFolder, check_folder
from genarm_fast.train.formats import Pair
from genarm_fast.train.model import PairModel, add_lora, choose_dtype, choose_paths, load_base
from genarm_fast.train.progress import progress_bar
from genarm_fast.train.trainer import ArmTrainer, sample
from genarm_fast.utils.disk import resumable

PROBE = 2  # pairs on which the fast paths are tried


@dataclass(frozen=True)
class TrainReport:
    """A finished run: its folder, and the content of its report.json."""

    folder: Path
    report: dict[str, Any]

    @property
    def accuracy(self) -> float | None:
        """Share of held-out pairs whose chosen response has the higher reward; None if none were held out."""
        return self.report["final"].get("accuracy")


def train(
    config: TrainConfig,
    *,
    data: Rows | None = None,
    eval_data: Rows | None = None,
    progress: bool = True,
    auxiliary_loss: Callable[[nn.Module, int], Tensor] | None = None,
) -> TrainReport:
    """Train an ARM from preference pairs (arXiv 2410.08193) and write it to `config.output`.

    A run that was killed continues from its last checkpoint, and ends with the weights that it would have had. A run
    that has finished returns its report at once. The folder is complete once report.json is in it. Processes started by
    torchrun or `accelerate launch` train together, and all return the report.

    Args:
        config: the options of the run.
        data, eval_data: rows in memory instead of those that the config names: a `datasets.Dataset`, or any iterable of
            dicts. `data_id` is their name in the report.
        progress: whether to show progress on stderr.
        auxiliary_loss: a function of the causal LM and the number of the micro-batch, from 0. It returns a scalar,
            which is added to each micro-batch's mean loss, for example to keep a small ARM near the base so that it can
            draft. A run must be continued with the same function: nothing can compare two functions.

    Raises:
        ValueError: malformed data, options that do not fit the model or the data, or an output folder that holds a run
            with other options, data or base.
        TypeError: data that are no rows, for example all splits of a `DatasetDict`.
        FileNotFoundError: a base that is found nowhere.
        BlockingIOError: another process trains in that folder.
        FloatingPointError: the loss is no longer finite.
    """
    check_call(config, data, eval_data)
    processes.connect()
    processes.from_first(lambda: check_folder(config))
    # The lock comes before anything is read: another run may just be about to finish.
    with ExitStack() as held:
        processes.from_first(lambda: bool(held.enter_context(locked(config.folder))))
        return _train(config, data, eval_data, progress and processes.rank() == 0, auxiliary_loss)


def _train(
    config: TrainConfig,
    data_rows: Rows | None,
    eval_rows: Rows | None,
    progress: bool,
    auxiliary_loss: Callable[[nn.Module, int], Tensor] | None,
) -> TrainReport:
    location = locate("base", config.base)
    check_files("base", location)
    if find_file(location, "adapter_config.json"):
        raise ValueError(f"base={config.base!r}: expected a whole model, got an adapter: merge it into its base first")
    tokenizer = load_tokenizer("base", location, trust_remote_code=config.trust_remote_code)
    if tokenizer is None:
        raise ValueError(f"base={config.base!r}: expected a folder or a hub id with a model and its tokenizer")
    check_servable(config, location)
    data = _read(config, tokenizer, location, data_rows, eval_rows)
    # Only the first process reads the folder. It tells the others, so that all decide alike.
    run = processes.from_first(lambda: RunFolder(config, data.training, data.held_out))
    if (finished := processes.from_first(run.report)) is not None:
        processes.from_first(lambda: check_same_base(config, location, finished))
        processes.from_first(lambda: _remove_checkpoints(config))  # a kill may have come before they were removed
        return TrainReport(config.folder, finished)
    processes.from_first(lambda: _check_writable(config))
    check_optimizer(config)
    dtype = choose_dtype(run.once("dtype", lambda: processes.from_first(lambda: _name(choose_dtype(config.dtype)))))
    model, base_fingerprint = _load(config, dtype, data)
    if run.once("base_fingerprint", lambda: base_fingerprint) != base_fingerprint:
        raise ValueError(f"base={config.base!r}: expected the weights that the run in {config.output!r} began with")
    probe = sorted(data.training, key=lambda pair: pair.tokens)[:PROBE]
    layout, fused = processes.from_first(lambda: choose_paths(model, probe))
    model.fused = fused
    collator = Collator(layout, tokenizer.pad_token_id or 0)

    started = time.perf_counter()
    with progress_bar(progress) as bar:
        processes.from_first(run.save)
        trainer = ArmTrainer(config, model, data.training, data.held_out, collator, dtype, bar, auxiliary_loss)
        before = run.once("before", lambda: trainer.pair_stats(data.held_out).summary())
        processes.from_first(run.save)
        checkpoint = processes.from_first(lambda: last_checkpoint(checkpoints(config)))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        final = trainer.pair_stats(data.held_out).summary()
        report = {
            "config": _portable_config(config),
            "base_fingerprint": base_fingerprint,
            "method": f"LoRA of rank {config.lora_rank}" if config.method == "lora" else "full fine-tuning",
            "lora_targets": lora_targets(model),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "dtype": _name(dtype),
            "layout": layout,
            "fused_head": fused,
            "data": data.summary | {"train_sha256": run.identity["train_sha256"]},
            "steps": trainer.steps,
            "continued_from_step": int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0,
            "processes": processes.count(),
            "seconds": time.perf_counter() - started,
            "tokens_per_second": trainer.speed().get("tokens_per_second"),
            "before": before,
            "final": final,
            "history": [
                {"step": 0, **_prefixed(before)},
                *trainer.history(),
                {"step": trainer.steps, **_prefixed(final)},
            ],
        }
        # JSON makes a new report equal to one that is read again.
        report = processes.from_first(lambda: json.loads(json.dumps(report)))
        with resumable(config.folder):
            processes.from_first(lambda: save_artifacts(model, tokenizer, config, report))
        processes.from_first(lambda: _remove_checkpoints(config))
    return TrainReport(config.folder, report)


def _remove_checkpoints(config: TrainConfig) -> None:
    shutil.rmtree(checkpoints(config), ignore_errors=True)


def _check_writable(config: TrainConfig) -> None:
    if not os.access(config.folder, os.W_OK):
        raise PermissionError(f"output={config.output!r}: expected a folder that can be written to")


@dataclass(frozen=True)
class _Data:
    training: list[Encoded]
    held_out: list[Encoded]
    summary: dict[str, Any]


def _read(config: TrainConfig, tokenizer: Any, location: Source, rows: Rows | None, eval_rows: Rows | None) -> _Data:
    encoder = Encoder(tokenizer, config, stop_ids(config, location))
    source = load_pairs(config.data if rows is None else rows, **loading_options(config))
    if source.format == "implicit" and (config.as_chat or config.prompt_template):
        raise ValueError(
            f"as_chat={config.as_chat}, prompt_template={config.prompt_template!r}: expected none where the rows "
            "have no 'prompt': what both texts begin with is a beginning, not a request"
        )
    if config.chat_template_kwargs and source.format != "messages" and not config.as_chat:
        raise ValueError(
            f"chat_template_kwargs={config.chat_template_kwargs!r}: expected none, the data is no chats (see as_chat)"
        )
    train_pairs, held_out_pairs = split_pairs(source.pairs, config, eval_rows)
    training, dropped = encoder(train_pairs, config.data or "data")
    held_out_name = "eval_data" if eval_rows is not None else config.eval_data or config.data or "data"
    if not config.as_chat and (config.eval_data is not None or eval_rows is not None):
        _check_alike(held_out_name, train_pairs, held_out_pairs)
    held_out, held_out_dropped = encoder(held_out_pairs, held_out_name)
    training = sample(training, config.max_pairs, config.seed)
    if not training:
        raise ValueError(
            f"data={config.data!r}: expected training pairs, all of {source.rows} rows are dropped ({dict(dropped)}) or"
            f" held out ({len(held_out_pairs)})"
        )
    chat = source.format == "messages" or config.as_chat
    transcripts = source.transcripts and config.prompt_template is None
    summary = {
        "format": source.format,
        "prompt_format": "chat" if chat else "transcript" if transcripts else "text",
        "chat_template": encoder.chat_template if chat else None,
        "chat_template_kwargs": encoder.recorded(train_pairs) if chat else None,
        "end_token_id": encoder.end_of_chat_answer if chat else tokenizer.eos_token_id,
        "rows": source.rows,
        "train_pairs": len(training),
        "train_pairs_with_margin": sum(bool(pair.margin) for pair in training),
        "train_tokens": sum(pair.tokens for pair in training),
        "held_out_pairs": len(held_out),
        "held_out_prompts_in_training": len({p.key for p in train_pairs} & {p.key for p in held_out_pairs}),
        "held_out_rows": [pair.row for pair in held_out],
        "dropped": dict(source.dropped),
        "dropped_train": dict(dropped),
        "dropped_held_out": dict(held_out_dropped),
    }
    return _Data(training, held_out, summary)


def _check_alike(name: str, training: list[Pair], held_out: list[Pair]) -> None:
    """Raises ValueError for held-out prompts of another kind: metrics on them would not describe decoding."""
    found, expected = prompt_kind(held_out), prompt_kind(training)
    # Transcripts are texts as well.
    if held_out and found != expected and (expected, found) != ("texts", "transcripts"):
        raise ValueError(f"{name}: its prompts are {found}: expected {expected}, as those that are trained on are")


def _load(config: TrainConfig, dtype: torch.dtype, data: _Data) -> tuple[PairModel, str | None]:
    """Return the model to train, and the fingerprint of its base."""
    lm: Any = load_base(config, dtype)
    check_supported("base", type(lm), lm.config)
    context = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in data.training + data.held_out)
    if context is not None and longest > context:
        raise ValueError(
            f"max_prompt_tokens, max_response_tokens: a pair has {longest} tokens, the base's context {context}"
        )
    highest = max(max(pair.prompt + pair.chosen + pair.rejected) for pair in data.training + data.held_out)
    if highest >= (rows := lm.get_input_embeddings().weight.shape[0]):
        raise ValueError(
            f"base={config.base!r}: its tokenizer gives token {highest}, expected less than {rows}, its rows"
        )
    base_fingerprint = fingerprint(lm)
    if config.method == "lora":
        lm = add_lora(lm, config)
    if config.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return PairModel(lm), base_fingerprint


def lora_targets(model: PairModel) -> list[str]:
    """Return the names of the linear layers that the run trained a LoRA on; [] without LoRA."""
    configs = getattr(model.lm, "peft_config", {})
    return sorted({name for config in configs.values() for name in config.target_modules})


def _portable_config(config: TrainConfig) -> dict[str, Any]:
    """Return the config for the report, without paths of this machine."""
    shown = asdict(config) | {"base": config.base_id or config.base, "output": config.folder.name}
    for name in ("data", "eval_data"):
        path = shown[name]
        shown[name] = Path(path).name if path and Path(path).exists() else path
    return shown | {"data": config.data_id or shown["data"] or "rows in memory"}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _prefixed(summary: dict[str, float]) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in summary.items()}
