"""Distil the demo's `small` model from the base, with teacher_data.py's shards.

The student is a narrow Llama with the base's vocabulary. Its tied embedding (49,152 rows) holds most of its parameters,
and starts as the truncated SVD of the base's embedding. `--hidden` is the student's width; it has 6 layers at any
width. The loss is in distillation_loss.py.

Muon trains the layers' matrices, AdamW the other parameters: in runs of 100,000 tokens the KL fell to 2.81, and with
AdamW for all parameters to 3.22.

A killed run continues from its last checkpoint. --tokens may change until the learning rate has begun to fall.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from agreement import Agreement, load_responses
from distillation_loss import batch_loss
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

HIDDEN, LAYERS, HEAD = 160, 6, 32  # 9.8 M parameters, 7.9 M of them the embedding
INHERITED = (
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
BATCH = 8  # responses in a step
LR, EMBEDDING_LR, CLIP = 1e-2, 3e-3, 1.0
WARMUP, DECAY = 20_000, 0.5  # tokens over which the rate rises; share of all tokens over which it falls
CHECKPOINT_S = 120


def new_student(base: LlamaForCausalLM, hidden: int = HIDDEN) -> LlamaForCausalLM:
    """Return a random student, except for its embedding: the base's rows in the basis of its largest singular vectors.

    `hidden` is the width. A head has 32 dimensions. The MLP is 2.8 times as wide, rounded to a multiple of 32.

    Raises:
        ValueError: `hidden` is not a multiple of 32 from 32 to the base's width.
    """
    if hidden % HEAD or not HEAD <= hidden <= base.config.hidden_size:
        most = base.config.hidden_size
        raise ValueError(f"hidden={hidden}: expected a multiple of {HEAD}, at most the base's width of {most}")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=base.config.vocab_size,
        hidden_size=hidden,
        num_hidden_layers=LAYERS,
        intermediate_size=HEAD * round(2.8 * hidden / HEAD),
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=hidden // HEAD,
        initializer_range=hidden**-0.5,
        tie_word_embeddings=True,
        **{key: copy.deepcopy(getattr(base.config, key)) for key in INHERITED},
    )
    student = LlamaForCausalLM(config)
    table = base.get_input_embeddings().weight.detach().float()
    _, basis = torch.linalg.eigh(table.T @ table)  # in ascending order
    with torch.no_grad():
        student.get_input_embeddings().weight.copy_(table @ basis[:, -hidden:])
        for layer in student.model.layers:  # small branches, so that the residual stream starts close to the embedding
            layer.self_attn.o_proj.weight.mul_((2 * LAYERS) ** -0.5)
            layer.mlp.down_proj.weight.mul_((2 * LAYERS) ** -0.5)
    return student


def add_dropout(student: LlamaForCausalLM, rate: float) -> None:
    """Add dropout in training mode after the embedding, each attention, each MLP and the last norm: Llama has none."""
    inner = student.model
    branches = [m for layer in inner.layers for m in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    for module in (inner.embed_tokens, *branches, inner.norm):
        module.register_forward_hook(lambda module, _, out: torch.nn.functional.dropout(out, rate, module.training))


def learning_rate(tokens: float, total: float) -> float:
    """Return the factor of the peak learning rate: a linear warm-up, a plateau, and a linear fall to zero."""
    return max(0.0, min(tokens / WARMUP, 1.0, (1 - tokens / total) / DECAY))


def save_model(student: LlamaForCausalLM, base_folder: str, output: Path) -> None:
    """Save the student in bfloat16 with the base's generation config. No tokenizer is saved: the base's is used."""
    shipped = LlamaForCausalLM(student.config).to(torch.bfloat16)
    shipped.load_state_dict(student.state_dict())
    shipped.generation_config = GenerationConfig.from_pretrained(base_folder, trust_remote_code=False)
    shipped.save_pretrained(output)


def plot(history: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, left = plt.subplots(figsize=(7, 4))
    tokens = [h["tokens"] / 1e6 for h in history]
    left.plot(tokens, [h["kl"] for h in history], "o-", color="C0", label="KL(base || small)")
    left.set(xlabel="million response tokens", ylabel="nats per token, held-out prompts")
    right = left.twinx()
    right.plot(tokens, [h["overlap"] for h in history], "s-", color="C1", label="Σ min(p, q)")
    right.plot(tokens, [h["top1"] for h in history], "^-", color="C2", label="same likeliest token")
    figure.legend(loc="upper center", ncol=3, fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="teacher_data.py's folder; read anew at each epoch")
    parser.add_argument("output", type=Path, help="folder for the model, checkpoint, report and curve")
    parser.add_argument("--held-out", type=Path, required=True, help="teacher_data.py --held-out's folder")
    parser.add_argument("--base", help="model folder or hub id; default: the demo's base")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help=f"the model's width (default: {HIDDEN})")
    parser.add_argument("--tokens", type=float, default=3e6, help="response tokens to train on, over all epochs")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--eval-every", type=float, default=2e5, help="response tokens between evaluations")
    args = parser.parse_args()
    if args.base is None:
        from genarm_fast.demo import base

        args.base = base()

    args.output.mkdir(parents=True, exist_ok=True)
    teacher = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32, trust_remote_code=False).eval()
    student = new_student(teacher, args.hidden)
    add_dropout(student, args.dropout)
    quick = Agreement(teacher, load_responses(args.held_out)[::8])
    del teacher
    embedding = student.get_input_embeddings().weight
    matrices = [p for p in student.model.layers.parameters() if p.ndim == 2]
    gains = [p for p in student.parameters() if p.ndim == 1]
    others = [{"params": [embedding], "peak_lr": EMBEDDING_LR}, {"params": gains, "peak_lr": LR}]
    optimizers: tuple[torch.optim.Optimizer, ...] = (
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        torch.optim.Muon([{"params": matrices, "peak_lr": LR}], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    state: dict[str, Any] = {"tokens": 0, "epoch": 0, "cursor": 0, "shards": [], "seconds": 0.0, "history": []}
    checkpoint = args.output / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        width = saved["model"]["model.embed_tokens.weight"].shape[1]
        if width != args.hidden:
            raise SystemExit(f"--hidden {args.hidden}: expected {width}, the width of {checkpoint}")
        student.load_state_dict(saved["model"])
        for optimizer, optimizer_state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(optimizer_state)
        state = saved["state"]

    def save_checkpoint() -> None:
        partial = checkpoint.with_suffix(".partial")
        states = [optimizer.state_dict() for optimizer in optimizers]
        torch.save({"model": student.state_dict(), "optimizers": states, "state": state}, partial)
        os.replace(partial, checkpoint)

    responses: list[dict[str, np.ndarray]] = []
    order = np.empty(0, int)
    last_save, running = time.monotonic(), math.nan
    bar = tqdm(total=int(args.tokens), initial=state["tokens"], unit="tok", unit_scale=True)
    while state["tokens"] < args.tokens:
        start = time.monotonic()
        if len(order) == 0:
            # Keep the epoch's list of shards, so that a resumed epoch sees the same order.
            state["shards"] = state["shards"] or sorted(p.name for p in args.shards.glob("*.npz"))
            responses = load_responses(args.shards, state["shards"])
            order = np.random.default_rng(state["epoch"]).permutation(len(responses))
        batch = [responses[i] for i in order[state["cursor"] : state["cursor"] + BATCH]]
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * learning_rate(state["tokens"] + 1, args.tokens)
        loss, n = batch_loss(student.train(), batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        for optimizer in optimizers:
            optimizer.step()
        student.zero_grad()
        before, state["tokens"] = state["tokens"], state["tokens"] + n
        state["cursor"] += BATCH
        if state["cursor"] >= len(order):
            state.update(epoch=state["epoch"] + 1, cursor=0, shards=[])
            order = np.empty(0, int)
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        state["seconds"] += time.monotonic() - start
        bar.update(n)
        bar.set_postfix(epoch=state["epoch"], responses=len(responses), loss=f"{running:.3f}")
        if state["tokens"] // args.eval_every > before // args.eval_every or state["tokens"] >= args.tokens:
            measured = quick.plain(student.eval())
            state["history"].append({"tokens": state["tokens"], "train_cross_entropy": running, **measured})
            bar.write(json.dumps(state["history"][-1]))
        if time.monotonic() - last_save > CHECKPOINT_S or state["tokens"] >= args.tokens:
            save_checkpoint()
            last_save = time.monotonic()

    save_model(student, args.base, args.output / "model")
    plot(state["history"], args.output / "curve.png")
    report = {
        "hidden": args.hidden,
        "parameters": student.num_parameters(),
        "response_tokens": state["tokens"],
        "epochs": state["epoch"] + state["cursor"] / len(responses),
        "responses": len(responses),
        "dropout": args.dropout,
        "seconds": round(state["seconds"]),
        "history": state["history"],
    }
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
