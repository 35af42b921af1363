"""The configuration hook's refusals in the frontend, before weights are read: no engine is started here."""

from __future__ import annotations

import shutil

import pytest
from engines import TOKENIZER
from tiny_models import build_model, build_tokenizer
from vllm.engine.arg_utils import EngineArgs

from genarm_fast.integrations.vllm import engine_args


def configured(models, arm="small", **options):
    settings = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}
    return EngineArgs(**engine_args(models / "base", models / arm, **(settings | options))).create_engine_config()


def test_what_is_supported_is_configured_once(models):
    config = configured(models)
    assert config.model_config.hf_config.genarm_vocab_size == 300
    (name,) = config.model_config.logits_processors
    assert name.startswith("genarm_fast.integrations.vllm.validator:")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": True}, "enable_lora"),
        ({"enable_dbo": True}, "enable_dbo"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"tensor_parallel_size": 3}, "3"),
    ],
)
def test_parts_of_vllm_that_do_not_fit(models, options, message):
    with pytest.raises(ValueError, match=message):
        configured(models, **options)


def test_lanes_and_pipeline_stages(models):
    with pytest.raises(ValueError, match="pipeline_parallel_size: expected 1 with LoRA lanes, which lora0 would be"):
        configured(models, "lora0", pipeline_parallel_size=2)


def test_v1_is_refused_with_what_to_set(models, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=1"):
        configured(models)


def test_another_version_is_refused(models, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.31.0")
    with pytest.raises(RuntimeError, match=r"vLLM 0.31.0: expected at least 0.32"):
        configured(models)


def test_members_that_read_other_prompts(models, tmp_path):
    shutil.copytree(models / "small", tmp_path / "bos")
    build_tokenizer(add_bos=True).save_pretrained(tmp_path / "bos")
    with pytest.raises(ValueError, match="its tokenizer reads"):
        configured(models, tmp_path / "bos")


def test_a_context_shorter_than_asked(models, tmp_path):
    build_model("llama", 3, max_position_embeddings=128).save_pretrained(tmp_path / "short")
    TOKENIZER.save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match="max_model_len=256: expected at most 128, the context of short"):
        configured(models, tmp_path / "short")


def test_a_recurrent_arm(models, tmp_path):
    from transformers import MambaConfig

    MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path / "mamba")
    with pytest.raises(ValueError, match="mamba: linear_attention: expected a decoder"):
        configured(models, tmp_path / "mamba")
