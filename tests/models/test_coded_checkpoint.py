"""Checkpoints of other quantisers: codes are kept where this format can hold them, and no weight changes silently."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from coded_folders import WIDE, awq, gptq, int_quantized, packed, save
from near_reference import largest_difference
from safetensors.torch import load_file, save_file
from tiny_models import build_model

from genarm_fast import GenARM
from genarm_fast.models.quantized import QuantizedMatrix


def scheme(bits, *, symmetric=True, strategy="group", group_size=32, **more):
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group_size}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | more}},
    }


def gptq_config(bits, size=32, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": True} | more


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
CASES = {  # config, packing, options of the random weight, bits that hold it
    "gptq": (gptq_config(4), lambda d: gptq(d, 4), {}, {4}),
    "gptq whose g_idx has the groups": (gptq_config(4, -1), lambda d: gptq(d, 4), {}, {4}),
    "gptq of 8 bits": (gptq_config(8), lambda d: gptq(d, 8), {"bits": 8}, {8}),
    "gptq v2": (gptq_config(4, checkpoint_format="gptq_v2"), lambda d: gptq(d, 4, "gptq_v2"), {}, {4}),
    "gptq with zeros": (gptq_config(4, sym=False), lambda d: gptq(d, 4), {"symmetric": False}, {8}),
    "gptq in act order": (gptq_config(4, desc_act=True), lambda d: gptq(d, 4), {"scattered": True}, {16}),
    "gptq of narrow groups": (gptq_config(4, 16), lambda d: gptq(d, 4), {"size": 16}, {16}),
    "awq": (AWQ, lambda d: awq(d, 4), {"symmetric": False}, {8}),
    "awq with few zeros": (AWQ, lambda d: awq(d, 4), {}, {4}),
    "compressed-tensors": (scheme(4), lambda d: packed(d, 4, symmetric=True), {}, {4}),
    "compressed-tensors with zeros": (
        scheme(4, symmetric=False),
        lambda d: packed(d, 4, symmetric=False),
        {"symmetric": False},
        {8},
    ),
    "compressed-tensors of 8 bits": (scheme(8), lambda d: packed(d, 8, symmetric=True), {"bits": 8}, {8}),
    "compressed-tensors, int8": (scheme(8), lambda d: int_quantized(d, 8, symmetric=True), {"bits": 8}, {8}),
    "compressed-tensors, int8 with zeros": (  # codes minus zeros have 9 bits
        scheme(8, symmetric=False),
        lambda d: int_quantized(d, 8, symmetric=False),
        {"bits": 8, "symmetric": False},
        {16},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_codes_are_taken(tmp_path, case):
    config, pack, draw, bits = CASES[case]
    expected = save(tmp_path, config, pack, **draw)
    model = GenARM.from_pretrained(tmp_path, quantization="exact")
    report = model.quantized["base"]
    coded = {matrix.name: matrix.bits for matrix in report.matrices if "proj" in matrix.name}
    assert len(coded) == 14
    assert set(coded.values()) == bits
    for name, weight in expected.items():
        held = model.base.model.get_parameter(name)
        assert torch.equal(held.bfloat16_values() if isinstance(held, QuantizedMatrix) else held, weight), name
    plain = build_model("llama", 0, **WIDE)
    plain.load_state_dict({name: weight.float() for name, weight in expected.items()})
    assert largest_difference(model, plain) < 0.3


def test_one_scale_an_output(tmp_path):
    """A channel's scale is repeated for each group, and a scale that no float16 holds is served as bfloat16."""
    for index, (dtype, bits) in enumerate(((torch.float16, 8), (torch.bfloat16, 8), (torch.float32, 16))):
        folder = tmp_path / str(index)
        folder.mkdir()
        config = scheme(8, strategy="channel", group_size=None)
        expected = save(folder, config, partial(one_scale, dtype=dtype), bits=8)
        model = GenARM.from_pretrained(folder, quantization="exact")
        stored = load_file(folder / "model.safetensors")
        for matrix in model.quantized["base"].matrices:
            if "proj" in matrix.name:
                assert matrix.bits == bits
                module = matrix.name.removesuffix(".weight")
                exact = stored[f"{module}.weight"].double() * stored[f"{module}.weight_scale"].double()
                held = model.base.model.get_parameter(matrix.name)
                values = held.bfloat16_values() if isinstance(held, QuantizedMatrix) else held
                assert torch.equal(values, exact.float().bfloat16())
                assert not torch.equal(values, expected[matrix.name])  # negative control: a weight with many scales


def one_scale(drawn, dtype):
    parts = int_quantized(drawn, 8, symmetric=True)
    scale = parts["weight_scale"][:, :1].to(dtype)
    return parts | {"weight_scale": scale * 1.0001 if dtype == torch.float32 else scale}


def test_a_code_that_changes_shows(tmp_path):
    """Another code in a file gives another weight, and a different model for adapters."""
    from genarm_fast.models.fingerprint import fingerprint

    save(tmp_path, gptq_config(4), lambda d: gptq(d, 4))
    before = GenARM.from_pretrained(tmp_path, quantization="exact").base.model
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.qweight"][0, 0] ^= 15  # the codes of eight inputs of the first output
    save_file(tensors, tmp_path / "model.safetensors")
    after = GenARM.from_pretrained(tmp_path, quantization="exact").base.model
    name = "model.layers.0.self_attn.q_proj.weight"
    held = [model.get_parameter(name).bfloat16_values() for model in (before, after)]
    assert (held[0] != held[1]).nonzero().tolist() == [[0, 0]]
    assert fingerprint(before) != fingerprint(after)


def test_what_is_refused(tmp_path):
    def refused(config, pack, message, change=None, **options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        save(folder, config, pack)
        if change is not None:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            GenARM.from_pretrained(folder, **({"quantization": "exact"} | options))

    def plain(d):
        return gptq(d, 4)

    q_proj = "model.layers.0.self_attn.q_proj"
    refused({"quant_method": "hqq", "bits": 4}, plain, "quant_method='hqq': expected none, or awq, compressed")
    refused(gptq_config(4), plain, "a checkpoint of gptq: expected quantization='exact'", quantization="int8")
    refused(gptq_config(3), plain, "bits=3: expected 4 or 8")
    refused(AWQ | {"version": "gemv"}, lambda d: awq(d, 4), "version='gemv', bits=4: expected 'gemm' and 4")
    refused(AWQ | {"group_size": 24}, lambda d: awq(d, 4), "group_size=24: expected that of 3 groups over 96 inputs")
    refused(scheme(4, type="float"), lambda d: packed(d, 4, symmetric=True), "type='float'")
    refused(scheme(4, strategy="block"), lambda d: packed(d, 4, symmetric=True), "strategy='block'")
    refused(gptq_config(4), plain, f"{q_proj}: expected qweight, qzeros, scales, lacks scales",
            lambda t: t.pop(f"{q_proj}.scales"))  # fmt: skip
    refused(gptq_config(4), plain, f"{q_proj}.weight of gptq: .*scales are NaN or infinite",
            lambda t: t[f"{q_proj}.scales"].fill_(torch.nan))  # fmt: skip
    refused(gptq_config(4), plain, f"{q_proj}.weight of gptq: .*groups up to 7, of 2",
            lambda t: t[f"{q_proj}.g_idx"].fill_(7))  # fmt: skip
    refused(gptq_config(4), plain, f"{q_proj}.weight of gptq: expected codes, zeros and scales that fit together",
            lambda t: t.update({f"{q_proj}.qzeros": t[f"{q_proj}.qzeros"][:, :2]}))  # fmt: skip
    refused(gptq_config(4), plain, f"has other shapes for .*{q_proj}.weight",
            lambda t: t.update({f"{q_proj}.{part}": t[f"{q_proj}.{part}"][:, :n] for part, n in
                                (("qweight", 8), ("qzeros", 1), ("scales", 8))}))  # fmt: skip
    refused(gptq_config(4), plain, f"lacks {q_proj}.weight",
            lambda t: [t.pop(f"{q_proj}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")])  # fmt: skip
    refused(gptq_config(4), plain, "expected dtype=torch.bfloat16", dtype=torch.float32)


def test_plain_checkpoints_have_no_codes(tmp_path):
    save(tmp_path, gptq_config(4), lambda d: gptq(d, 4))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="qweight is I32: expected floating-point numbers"):
        GenARM.from_pretrained(tmp_path, quantization="exact")
