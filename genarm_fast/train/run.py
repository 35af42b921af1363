"""`train`: from a config to a finished ARM folder, through kills and resumptions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoTokenizer, GenerationConfig

from .. import __version__
from ..fingerprint import fingerprint
from .artifacts import save_card, save_curve, save_info, save_weights
from .batches import Collator
from .config import OPERATIONAL, TrainConfig
from .data import load_pairs, split_pairs
from .encode import Encoded, Encoder
from .model import PairModel, add_lora, choose_dtype, choose_layout, load_base
from .trainer import ArmTrainer, checkpoints, last_checkpoint, steps, training_arguments, write_json

PROBE = 2  # pairs that the fast path is proved on


@dataclass(frozen=True)
class TrainReport:
    """A finished run: its folder, and what its report.json holds."""

    folder: Path
    report: dict[str, Any]

    @property
    def accuracy(self) -> float | None:
        """Share of held-out pairs whose chosen response has the higher reward; None if none were held out."""
        return self.report["final"].get("accuracy")


def train(config: TrainConfig, *, progress: bool = True) -> TrainReport:
    """Trains an ARM from preference pairs (arXiv 2410.08193, eq. 5) and writes it to `config.output`.

    A run that was killed continues from its last checkpoint; one that finished returns its report at once. The folder
    is complete once report.json is there.

    Raises:
        ValueError: malformed data, options that the model or the data do not fit, or a folder that holds a run with
            other options, data or base.
    """
    tokenizer = AutoTokenizer.from_pretrained(config.base)
    source = load_pairs(config.data, dataset_split=config.dataset_split)
    pairs, held_pairs = split_pairs(source.pairs, config)
    encoder = Encoder(tokenizer, config, _stop_ids(config.base))
    training, dropped = encoder(pairs)
    held, held_dropped = encoder(held_pairs)
    training = _sample(training, config.max_pairs, config.seed)
    if not training:
        raise ValueError(
            f"data={config.data!r}: expected training pairs, none left of {source.rows} rows ({dict(dropped)})"
        )
    identity = {
        "config": {k: v for k, v in _plain(config).items() if k not in OPERATIONAL},
        "train_sha256": _digest(training),
        "held_out_sha256": _digest(held),
    }
    finished = _open_run(config, identity)
    if finished is not None:
        return TrainReport(config.folder, finished)

    state = json.loads((config.folder / "run.json").read_text(encoding="utf-8"))
    dtype = choose_dtype(state.setdefault("dtype", str(choose_dtype(config.dtype)).removeprefix("torch.")))
    lm: Any = load_base(config, dtype)
    base_fingerprint = fingerprint(lm)
    if state.setdefault("base_fingerprint", base_fingerprint) != base_fingerprint:
        raise ValueError(f"base={config.base!r}: its weights changed since the run in {config.output!r} began")
    write_json(config.folder / "run.json", state)
    if config.method == "lora":
        lm = add_lora(lm, config)
    if config.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = PairModel(lm)
    paths = choose_layout(model, sorted(training, key=lambda pair: pair.tokens)[:PROBE])
    collator = Collator(paths["layout"], tokenizer.pad_token_id or 0)  # type: ignore[arg-type]
    arguments = training_arguments(config, dtype, len(training), progress)
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs: accelerate launch, never DataParallel
    trainer = ArmTrainer(config, model, training, _sample(held, config.eval_pairs or None, 0), collator, args=arguments)
    checkpoint = last_checkpoint(checkpoints(config))
    if held and checkpoint is None:
        state["before"] = trainer.pair_stats(trainer.eval_dataset).summary()  # type: ignore[arg-type]
        write_json(config.folder / "run.json", state)
    started = time.time()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    final = trainer.pair_stats(held).summary() if held else {}

    info = {
        "base": config.base_id or config.base,
        "base_fingerprint": base_fingerprint if config.method == "lora" else None,
        "beta": config.beta,
        "data": config.data_id or Path(config.data).name,
        "prompt_template": config.prompt_template,
        "chat_template": config.chat_template,
        "prompts": _describe_prompts(config, source.format),
        "max_prompt_tokens": config.max_prompt_tokens,
        "max_response_tokens": config.max_response_tokens,
        "trained_in": str(dtype).removeprefix("torch."),
        "versions": {
            "genarm_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "metrics": {
            name: final[name] for name in ("pairs", "accuracy", "accuracy_stderr", "margin_mean") if name in final
        },
    }
    report = {
        "config": {**_plain(config), "base": info["base"], "data": info["data"], "output": config.folder.name},
        "base_fingerprint": base_fingerprint,
        "method": f"LoRA rank {config.lora_rank}" if config.method == "lora" else "full fine-tuning",
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "dtype": info["trained_in"],
        **paths,
        "data": {
            "format": source.format,
            "rows": source.rows,
            "train_pairs": len(training),
            "held_out_pairs": len(held),
            "held_out_rows": [pair.row for pair in held],
            "train_sha256": identity["train_sha256"],
            "dropped": dict(source.dropped),
            "dropped_train": dict(dropped),
            "dropped_held_out": dict(held_dropped),
            "train_tokens": sum(pair.tokens for pair in training),
        },
        "steps": steps(config, len(training)),
        "resumed_from_step": int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0,
        "seconds": time.time() - started,
        "tokens_per_second": trainer.tokens_seen / max(trainer.seconds, 1e-9),
        "before": state.get("before", {}),
        "final": final,
        "history": trainer.state.log_history,
    }
    save_weights(model, tokenizer, config)
    save_info(config, info)
    save_curve(trainer.state.log_history, config.folder / "curve.png", f"{info['data']}, β_r = {config.beta}")
    save_card(config, info, report)
    write_json(config.folder / "report.json", report)
    shutil.rmtree(checkpoints(config), ignore_errors=True)
    return TrainReport(config.folder, report)


def _open_run(config: TrainConfig, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Claims the folder for this run. Returns the report if the run has finished already."""
    run = config.folder / "run.json"
    if run.is_file():
        if config.resume == "never":
            raise ValueError(f"output={config.output!r} holds a run already: expected a new folder with resume='never'")
        before = json.loads(run.read_text(encoding="utf-8"))["identity"]
        if before != identity:
            changed = sorted(
                {k for k in identity if k != "config" and before.get(k) != identity[k]}
                | {k for k, v in identity["config"].items() if before.get("config", {}).get(k) != v}
            )
            raise ValueError(
                f"output={config.output!r} holds a run with other options or data: {', '.join(changed)} changed"
            )
        report = config.folder / "report.json"
        return json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None
    if config.folder.is_dir() and any(config.folder.iterdir()):
        raise ValueError(f"output={config.output!r}: expected a new or empty folder, or one with a run to continue")
    config.folder.mkdir(parents=True, exist_ok=True)
    write_json(run, {"identity": identity})
    return None


def _plain(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _digest(pairs: list[Encoded]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.prompt, pair.chosen, pair.rejected]).encode())
    return digest.hexdigest()


def _sample(pairs: list[Encoded], n: int | None, seed: int) -> list[Encoded]:
    """n pairs, drawn by hash of their row: the same ones whatever else is in the list."""
    if n is None or len(pairs) <= n:
        return pairs
    rank = {pair.row: hashlib.sha256(f"{seed}\0{pair.row}".encode()).digest() for pair in pairs}
    return sorted(sorted(pairs, key=lambda pair: rank[pair.row])[:n], key=lambda pair: pair.row)


def _stop_ids(base: str) -> frozenset[int]:
    try:
        eos = GenerationConfig.from_pretrained(base).eos_token_id
    except OSError:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos or ())


def _describe_prompts(config: TrainConfig, format: str) -> str:
    if format == "messages" or config.as_chat:
        return "chat messages through " + (
            "a chat template of its own" if config.chat_template else "the tokenizer's chat template"
        )
    return f"text through {config.prompt_template!r}" if config.prompt_template else "raw text"
