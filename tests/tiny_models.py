"""Tiny random models and a tokenizer that can spell every string."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from genarm_fast.models.fingerprint import fingerprint

BOS, EOS = "<s>", "</s>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TEXT = [
    "the cat sat on the mat",
    "a man and the sea",
    "there is no place like home",
    "that and this and the other thing",
]
VOCAB_SIZE = 300
LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gpt2": {},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "num_hidden_layers": 6},
}
MIXTURES = {
    "qwen2_moe": {
        "num_key_value_heads": 2,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


def build_tokenizer(*, add_bos: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 4, trainer)
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)
    made.chat_template = CHAT_TEMPLATE
    assert len(made) == VOCAB_SIZE
    return made


def build_model(family: str, seed: int, vocab_size: int = VOCAB_SIZE, **config: object) -> PreTrainedModel:
    """Build a random float32 model whose weights are large enough that every token of the context matters."""
    settings = {"max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3}
    settings |= LAYERS | (FAMILIES | MIXTURES)[family] | {"vocab_size": vocab_size} | config
    if family == "gpt2":  # gpt2 has another name for this setting
        settings = {"n_inner" if name == "intermediate_size" else name: value for name, value in settings.items()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=torch.float32)
    return model.eval()


def save_adapter(
    folder: Path, *, base: Path, seed: int, config: Any = None, recorded_base: Path | None = None, **info: object
) -> PreTrainedModel:
    """Write a random adapter of the model in `base`, with the files that training writes; return base and adapter
    merged."""
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = fingerprint(model)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config or LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # only the adapter's parameters are trained
            parameter.data += torch.randn_like(parameter) * 0.3
    adapted.peft_config["default"].base_model_name_or_path = str(recorded_base or base)
    adapted.save_pretrained(folder)
    (folder / "genarm.json").write_text(json.dumps({"base": str(base), "base_fingerprint": expected, **info}))
    return adapted.merge_and_unload()


def similar(seed: int = 0, noise: float = 0.02):
    """Return a model that often predicts what the base (seed 0) predicts; with noise=0, always."""
    model = build_model("llama", 0)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return model


def edit(file, change):
    """Apply `change` to the tensors of a safetensors file and write it back."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
