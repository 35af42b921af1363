"""A model on the grid of 8 bits: `quantization="exact"` halves its size and changes no weight."""

import grid
import pytest
import torch
from tiny_models import build_model
from transformers import AutoModelForCausalLM

from genarm_fast.demo import arm
from genarm_fast.models.quantized import quantize_model


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=False)


def bits_of(model):
    return {matrix.bits for matrix in quantize_model("model", model, "exact").matrices}


def test_matrices_are_rounded_to_what_is_found_again(tmp_path):
    before = build_model("llama", 0).bfloat16()
    before.save_pretrained(tmp_path)
    assert bits_of(load(tmp_path)) == {16}
    change = grid.to_grid(tmp_path)
    after, held = load(tmp_path), load(tmp_path)
    assert bits_of(held) == {8}
    scales = []
    for name, weight in after.named_parameters():
        assert torch.equal(weight, held.get_parameter(name).data.to(torch.bfloat16))
        was = before.get_parameter(name).detach()
        if weight.ndim == 1:
            assert torch.equal(weight, was)
        else:
            scales.append(float(was.abs().max()))
            assert 0 < (weight - was).abs().max() <= was.abs().max() * (0.5 / 127 + 2**-8)
    assert 0 < change <= max(scales) * (0.5 / 127 + 2**-8)
    assert grid.to_grid(tmp_path) == 0  # the model is on the grid already


def test_a_matrix_off_the_grid_is_told(tmp_path, monkeypatch):
    build_model("llama", 0).bfloat16().save_pretrained(tmp_path)
    monkeypatch.setattr(grid, "dequantize", lambda codes: torch.rand(codes.codes.shape))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: no codes of 8 bits"):
        grid.to_grid(tmp_path)


def test_the_shipped_small_arm_is_on_the_grid():
    model = load(arm("small"))
    found = quantize_model("small", model, "exact")
    assert {matrix.bits for matrix in found.matrices} == {8}
    assert found.bytes_after < 0.54 * found.bytes_before
