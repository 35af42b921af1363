"""A base with int8 weights and activations, in bfloat16, with an ARM and a LoRA lane that are not quantised."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from engines import ALL, PROMPTS, TOKENIZER, asking, engine, loaded
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_models import save_adapter

PROMPT = PROMPTS[3] * 2
# Levels per sign. Using few of int8's 127 makes quantised weights differ clearly from others.
LEVELS = 7
# Mean difference of a log-probability: bfloat16 keeps 8 bits, and random models amplify the loss.
TOLERANCE = 0.6


def quantised(weight):
    """Return integers int8 [out, in] and a scale for each row [out, 1]."""
    scale = weight.abs().amax(1, keepdim=True) / LEVELS
    return (weight / scale).round().to(torch.int8), scale


def round_inputs(model):
    """Make each linear except the head round its inputs to int8, with a scale per token, as vLLM's kernel does."""

    def rounded(_, args):
        scale = args[0].abs().amax(-1, keepdim=True) / 127
        return ((args[0] / scale).round() * scale,)

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(rounded)


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """A folder with "int8", the base as compressed-tensors writes it, and "dequantised", the weights that it stands
    for."""
    folder = tmp_path_factory.mktemp("quantised")
    shutil.copytree(models / "small", folder / "small")
    for name in ("int8", "dequantised"):
        shutil.copytree(models / "base", folder / name)
    stored, meant = {}, {}
    for name, tensor in load_file(models / "base" / "model.safetensors").items():
        meant[name] = stored[name] = tensor
        if name.endswith("_proj.weight"):
            numbers, scale = quantised(tensor)
            stored |= {name: numbers, f"{name}_scale": scale}
            meant[name] = numbers * scale
    save_file(stored, folder / "int8" / "model.safetensors", {"format": "pt"})
    save_file(meant, folder / "dequantised" / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    inputs = weights | {"strategy": "token", "dynamic": True}
    config = json.loads((folder / "int8" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }
    (folder / "int8" / "config.json").write_text(json.dumps(config))
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=ALL)
    recorded = {"base": folder / "dequantised", "seed": 1, "config": lora, "recorded_base": folder / "int8"}
    save_adapter(folder / "lane", **recorded).save_pretrained(folder / "lane-merged")
    TOKENIZER.save_pretrained(folder / "lane-merged")
    return folder


@pytest.mark.filterwarnings("ignore:.*is believed")  # quantised weights have no fingerprint to compare
def test_each_member_keeps_its_own_quantisation(folders, models):
    weights = [0.8, -0.5]
    with engine(folders, ["small", "lane"], base="int8", dtype="bfloat16", max_logprobs=-1) as llm:
        asked = asking(weights, max_tokens=1, prompt_logprobs=-1)
        (output,) = llm.generate([{"prompt_token_ids": PROMPT}], asked, use_tqdm=False)
    found = torch.tensor([[row[token].logprob for token in range(300)] for row in output.prompt_logprobs[1:]])
    rows = torch.tensor([PROMPT[:-1]])

    def guided(*members):
        with torch.no_grad():
            base, small, lane = (member(rows).logits[0].double().log_softmax(-1) for member in members)
        return (base + weights[0] * small + weights[1] * lane).log_softmax(-1)

    members = [loaded(folders, name) for name in ("dequantised", "small", "lane-merged")]
    round_inputs(members[0])
    round_inputs(members[2])
    unquantised = [loaded(models, "base"), *members[1:]]
    # The difference is 0.23 for the right members, and 1.99 for the control, a base that was never quantised.
    assert (found - guided(*members)).abs().mean() < TOLERANCE < (found - guided(*unquantised)).abs().mean()
