"""Members in 8 and 4 bits: the bits of each matrix, adapters on top, and the same tokens as the naive decoder."""

from __future__ import annotations

import copy

import pytest
import torch
from against_reference import assert_equals_reference
from peft import LoraConfig
from tiny_models import build_model, build_tokenizer, save_adapter
from torch import nn
from torch.nn import functional

from genarm_fast import ARM, GenARM, SamplingParams
from genarm_fast.engine.verdict_key import verdict_key
from genarm_fast.kernels import QuantLinear, _native, quant_linear_reference
from genarm_fast.kernels.linear import cpu
from genarm_fast.kernels.quant_linear import dequantize, quantize
from genarm_fast.models.fingerprint import fingerprint
from genarm_fast.models.quantized import QuantizedMatrix, is_quantized, quantize_model
from genarm_fast.speculation.config import Speculation
from genarm_fast.train.model import PairModel

WIDE = {"hidden_size": 64, "intermediate_size": 96}
QUANTIZATIONS = ("exact", "int8", "int4")


def on_grid(model: nn.Module) -> nn.Module:
    """Round the layers to numbers that 4 bits hold, embedding and head to 8 bits, as in GGUF files; return the
    model."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            bits = 8 if "embed" in name or "head" in name else 4
            parameter.data = dequantize(quantize(parameter.data, bits)).to(torch.bfloat16)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    for name, seed, grid in (("base", 0, True), ("arm", 1, True), ("free", 0, False)):
        model = build_model("llama", seed, **WIDE).to(torch.bfloat16)
        (on_grid(model) if grid else model).save_pretrained(root / name)
        build_tokenizer().save_pretrained(root / name)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    save_adapter(root / "adapter", base=root / "base", seed=3, config=config)
    return root


def load(folders, quantization, **options) -> GenARM:
    arms = [ARM(folders / "arm", weight=0.5), ARM(folders / "adapter", weight=-0.7)]
    return GenARM.from_pretrained(folders / "base", arms, quantization=quantization, **options)


PROMPTS = [[5, 9, 33, 120, 7], [8, 250], list(range(20, 60))]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_tokens_of_the_naive_decoder(folders, quantization):
    model = load(folders, quantization)
    assert model.members[2].shared is model.members[0].shared  # the LoRA runs on the base's codes, in one forward
    assert all(is_quantized(member.model) for member in model.members)
    params = {"max_new_tokens": 12, "temperature": 0.8}
    outputs = model.generate(PROMPTS, [SamplingParams(**params, seed=seed) for seed in range(3)])
    for output in outputs:
        assert_equals_reference(model, output, weights=[0.5, -0.7], **params)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_reference_of_the_op_gives_the_same_bits(folders, monkeypatch, quantization):
    """Every logit of base and ARM is equal, decoded in batches. An adapter's sums have another order in the
    reference."""
    arms = [ARM(folders / "arm", weight=0.5)]

    def run():
        model = GenARM.from_pretrained(folders / "base", arms, quantization=quantization, speculation="off")
        params = SamplingParams(max_new_tokens=12, temperature=0.0, logprobs=3, rewards=True)
        return [each.completions[0] for each in model.generate(PROMPTS, params)]

    core = run()
    calls = []

    def in_pytorch(self, x, spans=()):
        calls.append(x.shape)
        return quant_linear_reference(x, self.weight, self.bias)

    monkeypatch.setattr(QuantLinear, "__call__", in_pytorch)
    monkeypatch.setattr(cpu, "prepare", lambda _: None)
    plain = run()
    assert calls
    for ours, theirs in zip(core, plain):
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs == theirs.logprobs
        assert ours.rewards == theirs.rewards


SPECULATIONS = [Speculation("arm", 3), Speculation("base", 2)]


@pytest.mark.parametrize("quantization", ["exact", "int8"])
@pytest.mark.parametrize("speculation", SPECULATIONS, ids=lambda each: each.drafter)
def test_drafts_change_no_token_and_no_bit(folders, monkeypatch, quantization, speculation):
    """Decoding with drafts over the core is compared with plain decoding over the op's reference in PyTorch."""
    arms = [ARM(folders / "arm", weight=0.5)]
    params = SamplingParams(max_new_tokens=16, temperature=0.7, seed=3, logprobs=2, rewards=True)

    def run(speculation):
        model = GenARM.from_pretrained(folders / "base", arms, quantization=quantization, speculation=speculation)
        outputs = model.generate(PROMPTS, params)
        return outputs[0].rounds, outputs

    rounds, drafted = run(speculation)
    assert rounds.drafted > 0
    monkeypatch.setattr(QuantLinear, "__call__", lambda self, x, spans=(): quant_linear_reference(x, self.weight))
    monkeypatch.setattr(cpu, "prepare", lambda _: None)
    _, plain = run("off")
    for ours, theirs in zip(drafted, plain):
        for name in ("token_ids", "logprobs", "rewards"):
            assert getattr(ours.completions[0], name) == getattr(theirs.completions[0], name), name


def test_changed_codes_are_another_model(folders):
    """A quantised model has its checkpoint's fingerprint until a code or a scale of any matrix changes."""
    base = load_alone(folders)
    plain = fingerprint(GenARM.from_pretrained(folders / "base").base.model)
    assert fingerprint(base) == plain
    names = [matrix.name for matrix in base.quantized.matrices]
    assert len(names) == 16
    for name in names:
        packed = base.get_parameter(name).linear.packed
        size = 32 * 4 * base.get_parameter(name).linear.bits
        for part in (packed[..., :size], packed[..., size:]):
            before = part.clone()
            part.bitwise_xor_(1)
            assert fingerprint(base) not in (plain, None), name
            part.copy_(before)
            assert fingerprint(base) == plain
    with torch.no_grad():
        packed.bitwise_xor_(1)
    adapter = ARM(folders / "adapter", base=base)
    with pytest.raises(ValueError, match="their weights differ from those it was trained on"):
        GenARM.from_pretrained(base, [adapter], tokenizer=build_tokenizer())


def load_alone(folders):
    return GenARM.from_pretrained(folders / "base", quantization="exact").base.model


def test_rebound_codes_are_noticed(folders):
    """A quantised model given to another GenARM stays its owner's: codes may change in place, but not move."""
    base = load_alone(folders)
    model = GenARM.from_pretrained(base, tokenizer=build_tokenizer())
    params = SamplingParams(max_new_tokens=4, temperature=0.0, logprobs=0)

    def logprobs():
        return model.generate([PROMPTS[0]], params)[0].completions[0].logprobs

    before = logprobs()
    up = base.model.layers[1].mlp.up_proj
    up.weight.linear.packed.bitwise_xor_(1)
    changed = logprobs()
    assert changed != before
    up.weight.linear.packed.bitwise_xor_(1)
    assert logprobs() == before
    up.weight = nn.Parameter(QuantizedMatrix(QuantLinear(up.weight.linear.weight)), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"the weight model.layers.1.mlp.up_proj.weight was moved"):
        logprobs()


def test_exact_gives_weights_back(folders):
    model = load(folders, "exact")
    plain = load(folders, None)
    assert plain.quantized == dict.fromkeys(model.quantized)
    for name in ("base", "arm"):
        report = model.quantized[name]
        assert {matrix.bits for matrix in report.matrices} == {4, 8}
        assert report.bytes_after < 0.5 * report.bytes_before
        assert "largest error of a weight 0" in str(report)
    for ours, theirs in zip(model.members, plain.members):
        assert fingerprint(ours.model) == fingerprint(theirs.model)
        for name, parameter in theirs.model.named_parameters():
            held = ours.model.get_parameter(name)
            assert torch.equal(held.bfloat16_values() if isinstance(held, QuantizedMatrix) else held, parameter)


def test_exact_leaves_other_weights_alone(folders):
    model = GenARM.from_pretrained(folders / "free", quantization="exact")
    report = model.quantized["base"]
    assert {matrix.bits for matrix in report.matrices} == {16}
    assert report.bytes_after == report.bytes_before
    assert not is_quantized(model.base.model)


@pytest.mark.parametrize(("quantization", "bits"), [("int8", {8}), ("int4", {4, 8})])
def test_rounded_weights(folders, quantization, bits):
    model = GenARM.from_pretrained(folders / "free", quantization=quantization)
    report = model.quantized["base"]
    assert {matrix.bits for matrix in report.matrices} == bits
    ends = {matrix.name: matrix.bits for matrix in report.matrices if "embed" in matrix.name or "head" in matrix.name}
    assert set(ends.values()) == {8}
    plain = GenARM.from_pretrained(folders / "free").base.model
    for matrix in report.matrices:
        held, parameter = (each.get_parameter(matrix.name) for each in (model.base.model, plain))
        assert (
            matrix.largest_error == float((held.bfloat16_values().float() - parameter.detach().float()).abs().max()) > 0
        )
        assert matrix.bytes_before == parameter.nbytes
        assert matrix.bytes_after == held.nbytes
    assert fingerprint(model.base.model) == fingerprint(plain)


def test_each_member_its_own(folders):
    arms = [ARM(folders / "arm", quantization="int4"), ARM(folders / "base", name="same", quantization="int8")]
    model = GenARM.from_pretrained(folders / "base", arms)
    assert [None if q is None else q.how for q in model.quantized.values()] == [None, "int4", "int8"]
    assert not is_quantized(model.base.model)


def test_the_self_check_tells_them_apart(folders):
    models = [GenARM.from_pretrained(folders / "base", quantization=how) for how in (None, "int8", "int4")]
    keys = {verdict_key([model.base]) for model in models}
    assert len(keys) == 3


def test_tied_weights_are_held_once(tmp_path):
    build_model("llama", 0, tie_word_embeddings=True, **WIDE).to(torch.bfloat16).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    model = GenARM.from_pretrained(tmp_path, quantization="int8").base.model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    names = [matrix.name for matrix in model.quantized.matrices]
    assert len(names) == len(set(names)) == 2 * 7 + 1


def test_errors(folders):
    base = folders / "base"
    for options, message in (
        ({"quantization": "int3"}, "quantization='int3': expected None or one of exact, int8, int4"),
        ({"quantization": "int8", "dtype": torch.float32}, r"base: quantization='int8': expected dtype=torch.bfloat16"),
        ({"quantization": "int8", "quantization_config": object()}, "expected one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            GenARM.from_pretrained(base, **options)
    with pytest.raises(ValueError, match=r"arms\[0\]: quantization='int8': expected none for an adapter"):
        GenARM.from_pretrained(base, [ARM(folders / "adapter", quantization="int8")])
    given = build_model("llama", 1, **WIDE)
    with pytest.raises(ValueError, match=r"arms\[0\]: quantization='int8': expected a folder or hub id"):
        GenARM.from_pretrained(base, [ARM(given, quantization="int8")])
    with pytest.raises(ValueError, match="quantization='int2'"):
        ARM(base, quantization="int2")
    broken = build_model("llama", 1, **WIDE).to(torch.bfloat16)
    broken.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight: weight: 1 values are NaN or infinite"):
        quantize_model("base", broken, "int8")


def test_training_refuses(folders):
    model = GenARM.from_pretrained(folders / "base", quantization="int8").base.model
    with pytest.raises(ValueError, match="held in 8 or 4 bits"):
        PairModel(model)
    with pytest.raises(ValueError, match="not quantised already"):
        quantize_model("base", model, "int8")


@pytest.mark.parametrize("bits", [8, 4])
def test_the_tensor(bits):
    linear = QuantLinear(quantize(torch.randn(40, 70), bits))
    held, values = QuantizedMatrix(linear), dequantize(linear.weight).bfloat16()
    x, ids = torch.randn(3, 70).bfloat16(), torch.tensor([[3, 39]])
    assert (held.shape, held.dtype, held.device.type) == ((40, 70), torch.bfloat16, "cpu")
    assert torch.equal(functional.linear(x, held), linear(x))
    assert torch.equal(
        functional.linear(x, weight=held, bias=values[:, 0]), QuantLinear(linear.weight, values[:, 0])(x)
    )
    assert torch.equal(functional.embedding(ids, held), values[ids])
    assert torch.equal(held[3:5] * 2, values[3:5] * 2)
    assert torch.equal(x @ held.T, x @ values.T)
    assert copy.deepcopy(held) is held
    assert type(held.detach()) is QuantizedMatrix
    assert held.data_ptr() == linear.packed.data_ptr()
    with pytest.raises(RuntimeError, match="held in 8 or 4 bits"):
        held.zero_()


@pytest.mark.skipif(_native.core is None, reason="needs the C++ core")
def test_the_fused_decoder_runs_on_codes(folders):
    model = load(folders, "int8")
    runner = model.members[0].shared
    assert "forward" in vars(runner.base_model)
