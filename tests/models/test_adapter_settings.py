"""Adapters and folders with settings that could be misread: they are read as PEFT reads them, or refused by name."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, VBLoRAConfig, get_peft_model
from tiny_models import build_model, build_tokenizer, edit, save_adapter
from transformers import AutoModelForCausalLM

from genarm_fast import ARM, GenARM
from genarm_fast.integrations.vllm import engine_args

TARGETS = ["q_proj", "down_proj"]


def put(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        # Initialisations that changed the base's weights as training began, from random numbers, gradients,
        # activations.
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4': expected one of .*convert the"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga': expected one of .*convert the adapter"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda': expected one of .*convert the adapter"),
        ({"init_lora_weights": "next_year"}, "init_lora_weights='next_year': expected one of"),
        # Python counts any non-empty text as true.
        ({"use_rslora": "false"}, "use_rslora='false': expected true or false"),
        ({"fan_in_fan_out": 0}, "fan_in_fan_out=0: expected true or false"),
    ],
)
def test_settings_that_would_be_misread(base, adapter, setting, said):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(ValueError, match=rf"arms\[0\]='.*adapter': {said}"):
        GenARM.from_pretrained(base, adapter)


def test_settings_that_are_null(base, adapter):
    """Older versions of PEFT wrote null for these settings."""
    path = adapter / "adapter_config.json"
    whole = GenARM.from_pretrained(base, adapter).score([[5]], [[6, 7]])[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": None, "init_lora_weights": None}))
    assert GenARM.from_pretrained(base, adapter).score([[5]], [[6, 7]])[0].rewards == whole.rewards


def test_a_matrix_under_several_names(base, tmp_path):
    """VB-LoRA saves the vector bank that its modules share only once; PEFT counts its other names as missing."""
    config = VBLoRAConfig(r=4, num_vectors=8, vector_length=16, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_adapter(tmp_path / "bank", base=base, seed=1, config=config)
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "bank").eval()
    found = GenARM.from_pretrained(base, tmp_path / "bank").arms[0].model
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.allclose(found(tokens).logits, expected(tokens).logits, atol=1e-4)
    edit(tmp_path / "bank" / "adapter_model.safetensors", lambda tensors: tensors.pop(min(tensors)))
    with pytest.raises(ValueError, match=r"expected the matrices of its adapter_config\.json, lacks"):
        GenARM.from_pretrained(base, tmp_path / "bank")


def test_a_peft_model_inside_another(tokenizer):
    inner = get_peft_model(build_model("llama", 0), LoraConfig(r=2, target_modules=TARGETS))
    outer = get_peft_model(inner, LoraConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(ValueError, match=r"arms\[0\]: a PeftModel inside a PeftModel: expected one"):
        GenARM.from_pretrained(build_model("llama", 0), outer, tokenizer=tokenizer)


def test_a_folder_around_the_model(base, adapter, tmp_path):
    """PEFT saves adapters of other names, and trainers save checkpoints, in folders inside the folder."""
    for name in ("checkpoint-8", "best"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    (tmp_path / "empty").mkdir()
    expected = "expected config.json or adapter_config.json in the folder"
    with pytest.raises(ValueError, match=rf"arms\[0\]='.*run': {expected}; is best or checkpoint-8 in it meant?"):
        GenARM.from_pretrained(base, tmp_path / "run")
    with pytest.raises(ValueError, match=rf"base='.*empty': {expected}$"):
        GenARM.from_pretrained(tmp_path / "empty")


def test_an_adapter_beside_a_whole_model(base, adapter):
    """The adapter may be a leftover of a merge: transformers would put it on the merged model once more."""
    build_model("llama", 3).save_pretrained(adapter)
    said = rf"arms\[0\]='.*adapter': a whole model \(model.safetensors\) and an adapter of '{re.escape(str(base))}'"
    with pytest.raises(ValueError, match=said):
        GenARM.from_pretrained(base, adapter)
    with pytest.raises(ValueError, match=said):
        engine_args(base, adapter)
    with pytest.raises(ValueError, match="their weights differ from those it was trained on"):
        GenARM.from_pretrained(base, ARM(adapter, base=adapter))
    (adapter / "model.safetensors").unlink()  # some trainers leave the base's config.json in the adapter's folder
    GenARM.from_pretrained(base, adapter)


def test_an_adapter_inside_its_base(base, adapter):
    """The adapter names its own folder as the base, as transformers writes it."""
    path = adapter / "adapter_config.json"
    whole = GenARM.from_pretrained(base, adapter).score([[5]], [[6, 7]])[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
    for each in adapter.iterdir():
        each.rename(base / each.name)
    model = GenARM.from_pretrained(build_model("llama", 0), base, tokenizer=build_tokenizer())
    assert model.score([[5]], [[6, 7]])[0].rewards["base2"].total == whole.rewards["adapter"].total


def test_constants_of_old_checkpoints(tmp_path):
    """GPT-2 checkpoints from before 2023 have a constant that transformers neither reads nor misses."""
    build_model("gpt2", 0).save_pretrained(tmp_path / "old")
    build_tokenizer().save_pretrained(tmp_path / "old")
    before = GenARM.from_pretrained(tmp_path / "old").score([[5]], [[6, 7]])[0].base_logprobs
    edit(tmp_path / "old" / "model.safetensors", put("transformer.h.0.attn.masked_bias"))
    assert GenARM.from_pretrained(tmp_path / "old").score([[5]], [[6, 7]])[0].base_logprobs == before


def test_keys_that_are_there_twice(base, adapter):
    """A repeated key in genarm.json is refused, as training never writes one. For other files a warning names it."""
    for path, key in ((base / "config.json", "hidden_act"), (adapter / "adapter_config.json", "lora_alpha")):
        path.write_text(path.read_text().replace("{", f'{{"{key}": "x", ', 1))
        with pytest.warns(UserWarning, match=rf"{re.escape(str(path))}: the key '{key}' is there twice: the last one"):
            GenARM.from_pretrained(base, adapter)
    path = adapter / "genarm.json"
    path.write_text(path.read_text().replace("{", '{"prompt_format": "chat", "prompt_format": "text", ', 1))
    with pytest.raises(ValueError, match=r"genarm.json: the key 'prompt_format' is there twice: expected it once"):
        GenARM.from_pretrained(base, adapter)
