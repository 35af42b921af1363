"""Makes models that compute the same function as a small model at the cost of a larger one.

    python benchmarks/inflated.py FOLDER [--base BASE] [--billions 0.5 1 1.7] [--adapter LORA ...]

What speculation gains depends on the ratio of the members' costs, and on how often their tokens agree. Real large
models are not available everywhere. The models made here have the real distributions of the small model, to the bit.
An added block is a copy of an existing one. The projections by which it adds to the residual stream are set to zero.
Each adapter of the small model gets copies that fit the larger models, for LoRA lanes: they have the same layers, but
another fingerprint of the base. Each adapter is also merged into the small model, which gives a small ARM.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from genarm_fast.demo import base
from genarm_fast.models.fingerprint import fingerprint

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt")


def deepen(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Add blocks that add zero to a Llama-like model, in place, until it has `layers` layers."""
    blocks = model.model.layers
    first = len(blocks)
    if layers < first:
        raise ValueError(f"layers={layers}: expected at least the {first} that there are")
    for i in range(first, layers):
        block = copy.deepcopy(blocks[i % first])
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            nn.init.zeros_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        block.self_attn.layer_idx = i
        blocks.append(block)
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i % first] for i in range(layers)]
    return model


def layers_for(model: PreTrainedModel, parameters: float) -> int:
    """Return the number of layers at which the model has about `parameters` parameters, embeddings included."""
    blocks = model.model.layers
    each = sum(parameter.numel() for parameter in blocks[0].parameters())
    return max(len(blocks), round((parameters - model.num_parameters()) / each) + len(blocks))


def inflate(source: Path, folder: Path, parameters: float) -> Path:
    """Save a deepened copy of the model in `source`, with its tokenizer, unless `folder` has one already."""
    if not (folder / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
        _save(deepen(model, layers_for(model, parameters)), source, folder)
    return folder


def merge_adapter(adapter: Path, source: Path, folder: Path) -> Path:
    """Save a copy of the model in `source` with a LoRA merged into its weights: a small ARM for the larger bases."""
    if not (folder / "config.json").exists():
        from peft import PeftModel

        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        _save(merged.to(AutoConfig.from_pretrained(source, trust_remote_code=False).dtype), source, folder)
    return folder


def _save(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Save a model with the tokenizer of the model in `source`. `folder` appears only once it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(partial)
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copy(path, partial)
    partial.rename(folder)


def fit_adapter(adapter: Path, model: Path, folder: Path) -> Path:
    """Save a copy of a LoRA for the deepened model. It adapts only the layers that it was trained on."""
    tensors = [name for name in _tensor_names(adapter) if ".layers." in name]
    last = max(int(name.split(".layers.")[1].split(".")[0]) for name in tensors)
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"layers_to_transform": list(range(last + 1)), "base_model_name_or_path": str(model)}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    info = json.loads((folder / "genarm.json").read_text())
    found = fingerprint(AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=False))
    info |= {"base": str(model), "base_fingerprint": found, "cost_inflated": True}
    (folder / "genarm.json").write_text(json.dumps(info, indent=1))
    return folder


def _tensor_names(adapter: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", type=Path, help="default: the demo's base")
    parser.add_argument("--billions", type=float, nargs="+", default=[0.5, 1.0, 1.7], help="parameters")
    parser.add_argument("--adapter", type=Path, nargs="*", default=[], help="LoRA adapters of the base")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    source = args.base or base()
    for adapter in args.adapter:
        print(merge_adapter(adapter, source, args.folder / f"{adapter.name}-merged"))
    for billions in args.billions:
        model = inflate(source, args.folder / f"{billions:g}B-cost-inflated", billions * 1e9)
        print(model)
        for adapter in args.adapter:
            print(fit_adapter(adapter, model, args.folder / f"{adapter.name}-{model.name}"))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
