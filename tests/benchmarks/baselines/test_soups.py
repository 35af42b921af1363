"""Averages of adapters: the changes they make to a weight, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny_models import save_adapter
from transformers import AutoModelForCausalLM

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapters(tmp_path: Path, tiny_model, tokenizer) -> tuple[Path, list[Path]]:
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    folders = [tmp_path / "one", tmp_path / "two"]
    for i, folder in enumerate(folders):
        save_adapter(folder, base=base, seed=i)
    return base, folders


def change(base: Path, folder: Path) -> torch.Tensor:
    """Return the change that an adapter makes to one weight."""
    bare = AutoModelForCausalLM.from_pretrained(base)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).merge_and_unload()
    return merged.get_submodule(MODULE).weight.data - bare.get_submodule(MODULE).weight.data


def factors(base: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor, float]:
    layer = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).get_submodule(
        "base_model.model." + MODULE
    )
    return layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data, layer.scaling["default"]


def test_both_averages(adapters, tmp_path: Path) -> None:
    from baselines.soups import soup

    base, folders = adapters
    changes = [change(base, folder) for folder in folders]
    (a1, b1, scale), (a2, b2, _) = (factors(base, folder) for folder in folders)
    sum_of_products = 0.3 * changes[0] + 0.7 * changes[1]
    product_of_sums = scale * (0.3 * b1 + 0.7 * b2) @ (0.3 * a1 + 0.7 * a2)
    assert not torch.allclose(sum_of_products, product_of_sums, atol=1e-2)  # else the case shows nothing

    exact = change(base, soup(folders, [0.3, 0.7], tmp_path / "products", "products"))
    torch.testing.assert_close(exact, sum_of_products, atol=1e-5, rtol=1e-4)
    published = change(base, soup(folders, [0.3, 0.7], tmp_path / "matrices"))
    torch.testing.assert_close(published, product_of_sums, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["matrices", "products"])
def test_corners_are_the_adapters(adapters, tmp_path: Path, kind: str) -> None:
    from baselines.soups import soup

    base, folders = adapters
    corner = change(base, soup(folders, [0.0, 1.0], tmp_path / "soup", kind))
    torch.testing.assert_close(corner, change(base, folders[1]), atol=1e-5, rtol=1e-4)


def test_a_soup_is_an_arm(adapters, tmp_path: Path, tokenizer) -> None:
    """The engine loads the soup as an adapter of the base, on shared weights."""
    from baselines.soups import soup

    from genarm_fast import GenARM

    base, folders = adapters
    model = GenARM.from_pretrained(base, [soup(folders, [0.5, 0.5], tmp_path / "soup", "products")])
    assert len(model.engine().executor.runners) == 1
    (output,) = model.generate([[2, 3]], max_new_tokens=3, seed=1)
    assert output.token_ids


def test_bad_arguments(adapters, tmp_path: Path) -> None:
    from baselines.soups import soup

    base, folders = adapters
    with pytest.raises(ValueError, match="sum to 1"):
        soup(folders, [0.5, 0.6], tmp_path / "soup")
    with pytest.raises(ValueError, match="kind='mean'"):
        soup(folders, [0.5, 0.5], tmp_path / "soup", "mean")
    other = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    save_adapter(tmp_path / "three", base=base, seed=3, config=other)
    with pytest.raises(ValueError, match="r=2: expected 4"):
        soup([folders[0], tmp_path / "three"], [0.5, 0.5], tmp_path / "soup")
    assert json.loads((folders[0] / "adapter_config.json").read_text())["r"] == 4
