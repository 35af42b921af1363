"""Tests of models that also read images, used and trained for text alone. Most have no class among the causal LMs."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_models import LAYERS, VOCAB_SIZE
from transformers import AutoConfig, AutoModelForImageTextToText, T5Config

from genarm_fast import ARM, GenARM, reference
from genarm_fast.models.checkpoint_fingerprint import checkpoint_fingerprint
from genarm_fast.train import TrainConfig, train

TEXT = LAYERS | {
    "vocab_size": VOCAB_SIZE, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
TOKENS = {"image_token_id": 292, "video_token_id": 293, "vision_start_token_id": 290, "vision_end_token_id": 291}
SMALL = {"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 16}
FAMILIES = {
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model"},
        "image_token_index": 292,
    },
    "qwen2_5_vl": {"text_config": TEXT | SECTIONS, "vision_config": SMALL, **TOKENS},
}


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path, tokenizer):
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **json.loads(json.dumps(FAMILIES[request.param])))
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def assert_equals_reference(folder, adapter, adapted):
    """Assert that the folder with an adapter writes the texts of the reference, which runs the adapted model."""
    base = AutoModelForImageTextToText.from_pretrained(folder).eval()
    model = GenARM.from_pretrained(folder, [ARM(adapter, weight=0.7)])
    assert type(model.base.model) is type(base)
    for output in model.generate([[5, 6, 7, 8], [*range(20, 45)], [3]], max_new_tokens=8, seed=3, ignore_eos=True):
        prompts = [output.prompt_token_ids] * 2
        expected = reference.generate(base, [adapted], prompts, [0.7], seed=3, max_new_tokens=8)
        assert output.token_ids == expected.tokens


def test_a_folder_with_an_adapter(folder, tmp_path):
    base = AutoModelForImageTextToText.from_pretrained(folder)
    assert checkpoint_fingerprint(folder) is None  # transformers saves other names than the model's own
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.2
    adapted.save_pretrained(tmp_path / "adapter")
    assert_equals_reference(folder, tmp_path / "adapter", adapted)


def test_training_leaves_what_reads_images_alone(folder, tmp_path):
    """A LoRA on layers for images would get no gradient. Their names may equal those of layers for text."""
    rows = [{"prompt": f"the cat {i}", "chosen": " sat", "rejected": f" ran {i}"} for i in range(8)]
    config = TrainConfig(
        base=str(folder), output=str(tmp_path / "arm"), batch_size=4, micro_batch_size=2, dtype="float32"
    )
    train(config, data=rows)
    settings = json.loads((tmp_path / "arm" / "adapter_config.json").read_text())
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(settings["target_modules"]) == names
    from peft import PeftModel

    base = AutoModelForImageTextToText.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "arm")).eval()
    trained = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert trained
    assert all(".language_model." in name for name in trained)
    assert_equals_reference(folder, tmp_path / "arm", adapted)


def test_a_kind_of_model_that_has_no_causal_lm(tmp_path):
    T5Config(vocab_size=8, num_layers=1, d_model=8, d_kv=1, d_ff=8).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(64)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"config.json: .*model_type='t5': transformers has no causal LM of that type$"
    ):
        GenARM.from_pretrained(tmp_path)
