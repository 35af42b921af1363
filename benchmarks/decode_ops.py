"""Compares rms_norm, rotary and silu_mul in a decode step of a Llama-like model with the modules that they replace.

    python benchmarks/decode_ops.py MODEL_FOLDER [--rounds N]

One transformers model takes turns with and without each op, after a prompt of 100 tokens. Figures are medians of CPU
time, in bfloat16 with one thread. Attention and linear layers are always PyTorch's own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama import modeling_llama as llama

from genarm_fast.kernels import rms_norm, rotary, silu_mul

OPS = ("nothing", "rms_norm", "rotary", "silu_mul", "all three")


def norm_forward(norm: nn.Module) -> Callable:
    weight = norm.weight.detach()
    return lambda x: rms_norm(x, weight, norm.variance_epsilon)


def mlp_forward(mlp: nn.Module) -> Callable:
    return lambda x: mlp.down_proj(silu_mul(mlp.gate_proj(x), mlp.up_proj(x)))


class Switch:
    """A switch that puts ops into a model and takes them out again."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.norms = [(m, norm_forward(m)) for m in modules if isinstance(m, llama.LlamaRMSNorm)]
        self.mlps = [(m, mlp_forward(m)) for m in modules if isinstance(m, llama.LlamaMLP)]
        self.plain_rotary = llama.apply_rotary_pos_emb

    def use(self, op: str) -> None:
        for name, modules in (("rms_norm", self.norms), ("silu_mul", self.mlps)):
            for module, forward in modules:
                module.__dict__.pop("forward", None)
                if op in (name, "all three"):
                    module.forward = forward
        llama.apply_rotary_pos_emb = rotary if op in ("rotary", "all three") else self.plain_rotary


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Small ops of a decode step, on the CPU.")
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, trust_remote_code=False).eval()
    switch, prompt = Switch(model), torch.arange(100)[None]
    print(f"| tokens | {' | '.join(f'{op}, ms' for op in OPS)} | same logits |\n|{'---|' * (len(OPS) + 2)}")
    for tokens in (1, 5):
        cache = DynamicCache(config=model.config)
        model(prompt, past_key_values=cache)
        times: dict[str, list[float]] = {op: [] for op in OPS}
        logits = {}
        for op in OPS * (options.rounds + 1):
            switch.use(op)
            start = time.process_time()
            logits[op] = model(prompt[:, :tokens], past_key_values=cache).logits
            times[op].append((time.process_time() - start) * 1e3)
            cache.crop(-tokens)
        same = all(torch.equal(logits["nothing"], found) for found in logits.values())
        print(f"| {tokens} | {' | '.join(f'{statistics.median(times[op][1:]):.1f}' for op in OPS)} | {same} |")


if __name__ == "__main__":
    main()
