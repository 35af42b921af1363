"""The calculator of `genarm-fast serve --plan`, compared with numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import build_model, save_adapter

from genarm_fast import ARM
from genarm_fast.integrations.vllm.plan import plan

LLAMA_70B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
PARAMETERS = 70_553_706_496  # Llama-3-70B's parameters, as its model card's files add up


def described(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_70B | config))
    return folder


def test_seventy_billion_parameters_on_eight_gpus(tmp_path):
    found = plan(described(tmp_path / "base"), [], tensor_parallel=8)
    (base,) = found.shares
    assert base.weights * 8 == 2 * PARAMETERS
    assert base.cache == 2 * 80 * 1 * 128 * 2  # keys and values, layers, heads of one GPU, dimensions, bytes
    left = 80e9 * 0.92 - 4 * 2**30 - PARAMETERS / 4
    assert found.tokens == int(left / base.cache)


def test_fewer_cache_heads_than_gpus_are_copied(tmp_path):
    base = described(tmp_path / "base", num_key_value_heads=2)
    assert [plan(base, [], tensor_parallel=n).cache_per_token for n in (1, 2, 8)] == [81920, 40960, 40960]


def test_a_base_in_four_bits(tmp_path):
    quantised = described(tmp_path / "base", quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128})
    tables = 2 * 128256 * 8192
    expected = tables * 2 + (PARAMETERS - tables) * (4 + 16 / 128) / 8
    assert plan(quantised, []).weights == pytest.approx(expected)


def test_an_arm_beside_and_a_lane(tmp_path):
    build_model("llama", 0).save_pretrained(tmp_path / "base")
    build_model("llama", 1, num_hidden_layers=1).save_pretrained(tmp_path / "small")
    save_adapter(tmp_path / "lora", base=tmp_path / "base", seed=0)
    found = plan(tmp_path / "base", [ARM(tmp_path / "small"), ARM(tmp_path / "lora")])
    base, small, lora = found.shares
    assert (base.cache, small.cache, lora.cache) == (2 * 2 * 2 * 8 * 2, 2 * 1 * 2 * 8 * 2, base.cache)
    assert base.weights == sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    assert 0 < lora.weights < base.weights
    assert lora.lane
    assert not small.lane
    assert "lora (lane)" in found.table(100)


def test_what_does_not_fit_is_said(tmp_path):
    assert "do not fit" in plan(described(tmp_path / "base"), []).table(4096)
    with pytest.raises(ValueError, match="tensor_parallel=3: expected a divisor of 64"):
        plan(tmp_path / "base", [], tensor_parallel=3)
    for wrong in ({"tensor_parallel": 0}, {"utilization": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            plan(tmp_path / "base", [], **wrong)
