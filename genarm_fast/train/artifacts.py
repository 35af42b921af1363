"""What a finished run leaves: weights, genarm.json, report.json, the curve and the model card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .config import TrainConfig
from .model import PairModel
from .trainer import write_json


def save_weights(model: PairModel, tokenizer: Any, config: TrainConfig) -> None:
    """The adapter, or the whole model with its tokenizer, in `save_dtype`; file by file atomic."""
    partial = config.folder / "weights.partial"
    dtype = getattr(torch, config.save_dtype)
    lm: Any = model.lm
    if config.method == "lora":
        if config.base_id:
            for adapter in lm.peft_config.values():
                adapter.base_model_name_or_path = config.base_id
        from peft import get_peft_model_state_dict

        state = {name: value.to(dtype) for name, value in get_peft_model_state_dict(lm).items()}
        lm.save_pretrained(partial, state_dict=state)
        (partial / "README.md").unlink(missing_ok=True)
    else:
        lm.to(dtype).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    for file in partial.iterdir():
        os.replace(file, config.folder / file.name)
    partial.rmdir()


def save_curve(history: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss, held-out accuracy and margin over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels: list[Any] = list(figure.subplots(1, 3))
    for axis, label, train, held in (
        (panels[0], "loss", "loss", "eval_loss"),
        (panels[1], "pair accuracy", "train_accuracy", "eval_accuracy"),
        (panels[2], "reward margin (nats)", "train_margin_mean", "eval_margin_mean"),
    ):
        for key, name, style in (
            (train, "training", {"color": "#9db4c0"}),
            (held, "held out", {"color": "#c1440e", "marker": "o", "markersize": 3}),
        ):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axis.plot(*zip(*points), label=name, **style)
        axis.set(xlabel="step", title=label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    panels[1].axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    panels[0].legend(frameon=False)
    figure.suptitle(title)
    partial = path.with_name("partial-" + path.name)
    figure.savefig(partial, dpi=130)
    os.replace(partial, path)


def save_card(config: TrainConfig, info: dict[str, Any], report: dict[str, Any]) -> None:
    """README.md in the form of a Hugging Face model card."""
    final = report["final"]
    before = report["before"]
    held_out = (
        f"| held-out pairs | accuracy before | accuracy | ± | margin (nats) | shorter-wins baseline |\n|---|---|---|---|---|---|\n"
        f"| {final['pairs']} | {before['accuracy']:.3f} | {final['accuracy']:.3f} | {final['accuracy_stderr']:.3f} "
        f"| {final['margin_mean']:.2f} | {final['length_baseline_accuracy']:.3f} |\n\n![training curve](curve.png)\n"
        if final
        else "No pairs were held out.\n"
    )
    text = (
        f"---\nbase_model: {info['base']}\nlibrary_name: {'peft' if config.method == 'lora' else 'transformers'}\n"
        f"tags: [genarm, autoregressive-reward-model]\n---\n\n# Autoregressive reward model\n\n"
        f"Guides a base model at decoding time (GenARM, arXiv 2410.08193): the log-probability of a token is its reward.\n\n"
        f"- base: `{info['base']}`, fingerprint `{info['base_fingerprint']}`\n"
        f"- β_r: {config.beta}\n"
        f"- data: `{info['data']}`, {report['data']['train_pairs']} training pairs, sha256 of their tokens `{report['data']['train_sha256'][:16]}`\n"
        f"- prompts: {info['prompts']}\n"
        f"- method: {report['method']}, {report['trainable_parameters']:,} trained parameters, {report['steps']} steps\n\n"
        f"## Held out\n\n{held_out}"
    )
    partial = config.folder / "README.md.partial"
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, config.folder / "README.md")


def save_info(config: TrainConfig, info: dict[str, Any]) -> None:
    """genarm.json: what the loader needs to know."""
    write_json(config.folder / "genarm.json", info)
