"""The files that a finished run writes: weights, genarm.json, the curve, the model card and, last, report.json."""

from __future__ import annotations

import os
import shutil
from typing import Any

import peft
import torch
import transformers
from matplotlib.figure import Figure

from genarm_fast import __version__
from genarm_fast.train.config import TrainConfig
from genarm_fast.train.files import replacing, write_json
from genarm_fast.train.model import PairModel

HELD_OUT, TRAINING = "#c1440e", "#8fa8b8"
PANELS = (
    ("loss", "loss", "eval_loss"),
    ("pair accuracy", "train_accuracy", "eval_accuracy"),
    ("reward margin (nats)", "train_margin_mean", "eval_margin_mean"),
)


def save_artifacts(model: PairModel, tokenizer: Any, config: TrainConfig, report: dict[str, Any]) -> None:
    """Fill the output folder. report.json is written last and shows that the other files are complete."""
    info = genarm_info(config, report)
    save_weights(model, tokenizer, config, info["base"])
    write_json(config.folder / "genarm.json", info)
    with replacing(config.folder / "curve.png") as path:
        curve(report["history"], f"{info['data']}, β_r = {config.beta:g}").savefig(path, dpi=130)
    with replacing(config.folder / "README.md") as path:
        path.write_text(model_card(info, report), encoding="utf-8")
    write_json(config.folder / "report.json", report)


def save_weights(model: PairModel, tokenizer: Any, config: TrainConfig, base: str) -> None:
    """Write the adapter, or the whole model with its tokenizer, in `save_dtype`."""
    dtype = getattr(torch, config.save_dtype)
    lm: Any = model.lm
    partial = config.folder / "weights"
    if config.method == "lora":
        lm.peft_config["default"].base_model_name_or_path = base
        state = {
            name: tensor.to(dtype)
            for name, tensor in peft.get_peft_model_state_dict(lm, save_embedding_layers=False).items()
        }
        lm.save_pretrained(partial, state_dict=state, save_embedding_layers=False)  # "auto" would ask the hub
        (partial / "README.md").unlink()  # PEFT's own model card
    else:
        lm.to(dtype).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    for file in partial.iterdir():
        # A folder of further chat templates. A kill may have left an old one.
        if file.is_dir():
            shutil.rmtree(config.folder / file.name, ignore_errors=True)
        os.replace(file, config.folder / file.name)
    partial.rmdir()


def genarm_info(config: TrainConfig, report: dict[str, Any]) -> dict[str, Any]:
    """Return genarm.json: what loading and guiding need to know.

    `base_fingerprint` is None for an ARM with all weights of its own.
    """
    final = report["final"]
    return {
        "base": report["config"]["base"],
        "base_fingerprint": report["base_fingerprint"] if config.method == "lora" else None,
        "beta": config.beta,
        "data": report["config"]["data"],
        "prompt_format": report["data"]["prompt_format"],
        "prompt_template": config.prompt_template,
        "chat_template": report["data"]["chat_template"],
        "chat_template_kwargs": report["data"]["chat_template_kwargs"],
        "end_token_id": report["data"]["end_token_id"],
        "max_prompt_tokens": config.max_prompt_tokens,
        "max_response_tokens": config.max_response_tokens,
        "dtype": report["dtype"],
        "trust_remote_code": config.trust_remote_code,
        "versions": {
            "genarm_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "metrics": {name: final[name] for name in ("pairs", "accuracy", "accuracy_stderr", "margin_mean") if final},
    }


def curve(history: list[dict[str, Any]], title: str) -> Figure:
    """Draw loss, pair accuracy and reward margin over steps, for training and held-out pairs."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes: list[Any] = list(figure.subplots(1, len(PANELS)))
    for axis, (label, training, held_out) in zip(axes, PANELS):
        for key, name, style in (
            (training, "training", {"color": TRAINING, "linewidth": 1.2}),
            (held_out, "held out", {"color": HELD_OUT, "linewidth": 1.8, "marker": "o", "markersize": 4}),
        ):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axis.plot(*zip(*points), label=name, **style)
        axis.set(xlabel="step", title=label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    axes[1].axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes[2].axhline(0.0, color="grey", linewidth=0.8, linestyle=":")
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    return figure


def model_card(info: dict[str, Any], report: dict[str, Any]) -> str:
    """Return the text of README.md, in the form that the Hugging Face hub shows."""
    config, data, before, final = (report[name] for name in ("config", "data", "before", "final"))
    rows = {
        "base": f"`{info['base']}`, fingerprint `{report['base_fingerprint']}`",
        "β_r": f"{info['beta']:g}",
        "data": f"`{info['data']}`: {data['train_pairs']:,} pairs, {data['train_tokens']:,} tokens",
        "prompts": _prompts(config, data["prompt_format"]),
        "lengths": f"at most {config['max_prompt_tokens']} prompt and {config['max_response_tokens']} response tokens",
        "trained": f"{report['method']} ({report['trained_parameters']:,} parameters), {report['steps']} steps, "
        f"{report['dtype']}",
    }
    if final:
        rows |= {
            "held-out accuracy": f"{final['accuracy']:.3f} ± {final['accuracy_stderr']:.3f} of {final['pairs']} pairs "
            f"(base: {before['accuracy']:.3f}; shorter response wins: {final['length_baseline_accuracy']:.3f})",
            "held-out margin": f"{final['margin_mean']:.2f} nats, standard deviation {final['margin_std']:.2f}, "
            f"correlation with the length difference {final['length_margin_correlation']:.2f}",
        }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    library = "peft" if config["method"] == "lora" else "transformers"
    return (
        f"---\nbase_model: {info['base']}\nlibrary_name: {library}\n"
        "tags: [genarm, autoregressive-reward-model]\n---\n\n# Autoregressive reward model\n\n"
        "Steers a language model while it decodes (GenARM, arXiv 2410.08193): the log-probability that this model "
        "gives a token is the token's reward.\n\n"
        "```python\nfrom genarm_fast import GenARM\n\n"
        f'model = GenARM.from_pretrained("{info["base"]}", arms=["this/folder"])\n```\n\n'
        f"| | |\n|---|---|\n{table}\n\n![training curve](curve.png)\n"
    )


def _prompts(config: dict[str, Any], prompt_format: str) -> str:
    if prompt_format == "chat":
        return "chat messages, " + (
            "chat template in genarm.json" if config["chat_template"] else "the base's chat template"
        )
    template = config["prompt_template"]
    return f"`{template!r}`" if template else "raw text"
