"""Cost-inflated models: the same function bit for bit, and adapters that fit them."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import LoraConfig
from tiny_models import save_adapter

from genarm_fast import GenARM


@pytest.fixture
def inflated(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module `inflated`. The benchmarks are no package: they import each other by name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("inflated")


@pytest.fixture
def saved(tmp_path: Path, tiny_model, tokenizer) -> Path:
    folder = tmp_path / "base"
    tiny_model(seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(2, 32)[None]).logits


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # families without and with biases
def test_logits_are_equal_to_the_bit(inflated, tiny_model, family: str) -> None:
    model = tiny_model(family, seed=3)
    deep = inflated.deepen(copy.deepcopy(model), 9)
    assert deep.num_parameters() > 2 * model.num_parameters()
    assert torch.equal(logits(deep), logits(model))
    deep.model.layers[5].mlp.down_proj.weight.data[0, 0] = 1e-3
    assert not torch.equal(logits(deep), logits(model))


def test_fewer_layers_are_refused(inflated, tiny_model) -> None:
    with pytest.raises(ValueError, match="layers=1"):
        inflated.deepen(copy.deepcopy(tiny_model()), 1)


def test_size(inflated, tiny_model) -> None:
    model = tiny_model()
    layers = inflated.layers_for(model, 3 * model.num_parameters())
    found = inflated.deepen(copy.deepcopy(model), layers).num_parameters()
    assert found == pytest.approx(3 * model.num_parameters(), rel=0.15)
    assert inflated.layers_for(model, 1) == 2


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "down_proj"]])
def test_saved_models_and_adapters_give_the_same_text(inflated, saved: Path, tmp_path: Path, modules) -> None:
    save_adapter(tmp_path / "lora", base=saved, seed=1, config=LoraConfig(r=4, target_modules=modules))
    deep = inflated.inflate(saved, tmp_path / "deep", 100_000)
    fitted = inflated.fit_adapter(tmp_path / "lora", deep, tmp_path / "lora-deep")
    plain, large = GenARM.from_pretrained(saved, tmp_path / "lora"), GenARM.from_pretrained(deep, fitted)
    assert large.base.model.num_parameters() > 2 * plain.base.model.num_parameters()
    assert large.base.shared is large.arms[0].shared  # base and ARM are lanes of one forward
    one, other = (
        m.generate([[5, 6, 7]], seed=2, max_new_tokens=20, rewards=True, ignore_eos=True) for m in (plain, large)
    )
    assert one[0].token_ids == other[0].token_ids
    assert [*one[0].rewards.values()] == [*other[0].rewards.values()]
    assert json.loads((fitted / "genarm.json").read_text())["cost_inflated"]


def test_a_merged_adapter_is_a_small_arm_of_a_larger_base(inflated, saved: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "lora", base=saved, seed=1, config=LoraConfig(r=4, target_modules="all-linear"))
    deep = inflated.inflate(saved, tmp_path / "deep", 100_000)
    merged = inflated.merge_adapter(tmp_path / "lora", saved, tmp_path / "merged")
    lanes, pair = GenARM.from_pretrained(saved, tmp_path / "lora"), GenARM.from_pretrained(deep, merged)
    texts = [m.generate([[5, 6, 7]], seed=2, max_new_tokens=20, ignore_eos=True)[0].token_ids for m in (lanes, pair)]
    assert texts[0] == texts[1] != lanes.generate([[5, 6, 7]], weights=0, seed=2, max_new_tokens=20)[0].token_ids


def test_an_adapter_as_it_was_is_refused(inflated, saved: Path, tmp_path: Path) -> None:
    deep = inflated.inflate(saved, tmp_path / "deep", 100_000)
    save_adapter(tmp_path / "lora", base=saved, seed=1, recorded_base=tmp_path / "gone")
    with pytest.raises(ValueError, match="adapter of"):
        GenARM.from_pretrained(deep, tmp_path / "lora")
