"""GGUF files: plain models of their dequantised weights, which "exact" holds in the file's own bits."""

from __future__ import annotations

import pytest
import torch
from near_reference import largest_difference
from tiny_models import build_model, build_tokenizer, save_adapter

from genarm_fast import ARM, GenARM
from genarm_fast.models.fingerprint import fingerprint
from genarm_fast.models.quantized import QuantizedMatrix

gguf_file = pytest.importorskip("gguf_file", reason="needs the package gguf", exc_type=ImportError)
WIDE = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    for layers in ("Q4_0", "Q4_1", "Q8_0", "F16"):
        torch.save(
            gguf_file.write(folder / f"{layers}.gguf", build_model("llama", 0, **WIDE), build_tokenizer(), layers),
            folder / layers,
        )
    return folder


def load(folder, name, **options):
    options = {"dtype": torch.bfloat16, "quantization": "exact"} | options
    return GenARM.from_pretrained(folder, gguf_file=f"{name}.gguf", **options)


@pytest.mark.parametrize(("name", "bits"), [("Q4_0", {4, 8}), ("Q4_1", {4, 8}), ("Q8_0", {8}), ("F16", {8, 16})])
def test_exact_holds_what_the_file_holds(folder, name, bits):
    expected = torch.load(folder / name)
    model = load(folder, name)
    matrices = model.quantized["base"].matrices
    assert {matrix.bits for matrix in matrices} == bits
    assert {matrix.bits for matrix in matrices if "embed" in matrix.name or "head" in matrix.name} == {8}
    for weight, values in expected.items():
        held = model.base.model.get_parameter(weight)
        assert torch.equal(held.bfloat16_values() if isinstance(held, QuantizedMatrix) else held, values.bfloat16())
    assert largest_difference(model, model.base.model) < 0.15
    plain = build_model("llama", 0, **WIDE)
    plain.load_state_dict(expected)
    assert largest_difference(model, plain) < 0.3  # the plain model is float32
    plain.model.layers[0].self_attn.q_proj.weight.data.neg_()  # negative control
    assert largest_difference(model, plain) > 0.5


def test_a_file_is_a_plain_model(folder):
    """Without `quantization` the weights are plain numbers, with a fingerprint, adapters, and the file's tokenizer."""
    model = load(folder, "Q4_1", quantization=None)
    assert all(type(parameter) is torch.nn.Parameter for parameter in model.base.model.parameters())
    assert fingerprint(model.base.model) == fingerprint(load(folder, "Q4_1").base.model) is not None
    text = "the cat sat on the mat"
    assert model.tokenizer(text).input_ids == build_tokenizer()(text).input_ids
    assert load(folder, "Q4_1", dtype=torch.float32, quantization=None).base.model.dtype == torch.float32


def test_arms_beside_a_file(folder, tmp_path):
    """Only the base comes from the file: an ARM's folder without it is a checkpoint, and an adapter runs on the base's
    codes."""
    plain = load(folder, "Q4_1", quantization=None)
    plain.base.model.save_pretrained(tmp_path / "plain")
    build_tokenizer().save_pretrained(tmp_path / "plain")
    save_adapter(tmp_path / "adapter", base=tmp_path / "plain", seed=3)
    arms = [ARM(tmp_path / "plain", name="plain", weight=0.5), ARM(tmp_path / "adapter", weight=-0.7)]
    model = load(folder, "Q4_1", arms=arms)
    assert model.members[2].shared is model.members[0].shared
    assert [report is not None for report in model.quantized.values()] == [True, True, True]
    assert fingerprint(model.members[1].model) == fingerprint(model.base.model)
    assert len(model.generate([[5, 9, 33]], max_new_tokens=4)[0].completions[0].token_ids) == 4


def test_errors(folder, tmp_path):
    with pytest.raises(ValueError, match=r"quantization='exact': expected dtype=torch.bfloat16"):
        load(folder, "Q4_1", dtype=torch.float32)
    broken = tmp_path / "cut.gguf"
    broken.write_bytes((folder / "Q4_1.gguf").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"base=.*: expected a folder or a hub id that can be loaded"):
        GenARM.from_pretrained(tmp_path, gguf_file="cut.gguf", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"base=.*expected a folder or a hub id that can be loaded"):
        GenARM.from_pretrained(tmp_path, gguf_file="none.gguf", dtype=torch.bfloat16)
