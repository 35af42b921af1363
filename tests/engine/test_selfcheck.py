"""The self-check refuses models whose cache cannot be addressed as the engine needs, and no other."""

from __future__ import annotations

from types import MethodType

import accelerate
import pytest
import torch
from tiny_models import FAMILIES, MIXTURES, build_model
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from genarm_fast import ARM, GenARM
from genarm_fast.engine import selfcheck
from genarm_fast.engine.model_runner import ModelRunner
from genarm_fast.kernels import _native
from genarm_fast.models.fast_modules import make_fast
from genarm_fast.models.lora_lanes import share_forwards
from genarm_fast.models.member import Member


def member(model, tokenizer) -> Member:
    return Member("base", model, tokenizer)


def probe_of(members):
    """Return a runner made as the self-check makes it."""
    runner = ModelRunner(members)
    runner.refresh()
    runner.discover(3, selfcheck.ROW_TOKENS)
    return runner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
@torch.inference_mode()
def test_supported_families_pass(tokenizer, family, dtype):
    """The deviation is below half of the tolerance."""
    one = member(build_model(family, 0).to(dtype), tokenizer)
    (error,) = selfcheck.deviations([one], probe_of([one]), 0)
    assert error < 0.5 * selfcheck.tolerance(one)
    assert selfcheck.entries_of([one])[0].dtype == dtype


def test_it_runs_once_for_a_model_as_it_is_loaded(tokenizer, monkeypatch):
    model = build_model("llama", 0)
    calls, deviations = [], selfcheck.deviations
    monkeypatch.setattr(selfcheck, "deviations", lambda *args: calls.append(args) or deviations(*args))
    guided = GenARM.from_pretrained(model, tokenizer=tokenizer)
    assert len(calls) == 1
    for _ in range(2):
        guided.generate([5, 6], max_new_tokens=2)
        guided.score([5, 6], [[7]])
    assert len(calls) == 1


def biased(module, query, key, value, attention_mask, **kwargs):
    """Attend as ALiBi does: nearer tokens count more, by the model's own attention function."""
    length = key.shape[2]
    bias = torch.arange(length, dtype=query.dtype).expand(query.shape[2], length) * 0.05
    causal = torch.full((query.shape[2], length), -torch.inf).triu(1) + bias
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=causal)
    return out.transpose(1, 2), None


def own_bias(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "biased", biased)
    model = build_model("llama", 0)
    model.config._attn_implementation = "biased"
    return model


def positions_by_count(monkeypatch):
    """Return a model that takes positions from the cache's length and ignores its position argument."""
    model = build_model("gpt2", 0)
    forward = type(model.transformer.wpe).forward
    model.transformer.wpe.forward = MethodType(
        lambda self, positions: forward(self, torch.arange(positions.shape[-1])[None]), model.transformer.wpe
    )
    return model


def asks_for_sinks(monkeypatch):
    class Sinks(modeling_llama.LlamaAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs, s_aux=torch.zeros(4))

    model = build_model("llama", 0)
    for layer in model.model.layers:
        layer.self_attn.__class__ = Sinks
    return model


@pytest.mark.parametrize("broken", [own_bias, positions_by_count, asks_for_sinks])
def test_others_are_refused(tokenizer, monkeypatch, broken):
    """The models are refused at load, in any role."""
    good, bad = build_model("llama", 1), broken(monkeypatch)
    refusal = "the (llama|gpt2) model does not give the same logits over a static cache"
    for name, base, options in (
        ("arm", good, {"arms": bad}),
        ("base", bad, {}),
        ("draft_model", good, {"draft_model": bad}),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {refusal}"):
            GenARM.from_pretrained(base, tokenizer=tokenizer, **options)
    assert GenARM.from_pretrained(good, tokenizer=tokenizer).generate([5, 6], max_new_tokens=2)


class Rounded(torch.nn.Linear):
    """A linear that rounds activations to 8 bits by the largest one in the batch."""

    def forward(self, x):
        scale = x.abs().max() / 127
        return super().forward((x / scale).round() * scale)


def test_rounding_by_the_whole_batch_is_no_fault(tokenizer):
    model = build_model("llama", 0)
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Rounded
    one = member(model, tokenizer)
    with torch.inference_mode():
        (error,) = selfcheck.deviations([one], probe_of([one]), 0)
    assert error > selfcheck.tolerance(one)
    assert selfcheck.entries_of([one])


@pytest.mark.skipif(_native.core is None, reason="without the C++ core rounding is the model's own")
def test_a_deep_model_that_magnifies_rounding_passes(tokenizer, monkeypatch):
    """Such a model passes, and one that is wrong besides does not."""
    model = build_model("llama", 0, num_hidden_layers=16).to(torch.bfloat16)
    for parameter in model.model.layers.parameters():
        if parameter.ndim == 2:
            parameter.data *= 2
    one = member(model, tokenizer)
    with torch.inference_mode():
        (error,) = selfcheck.deviations([one], probe_of([one]), 0)
    assert error > selfcheck.tolerance(one)
    monkeypatch.setattr(selfcheck, "TRIES", 1)
    assert selfcheck.entries_of([one])
    selfcheck._entries_by_model.clear()
    embed = model.model.embed_tokens
    forward = type(embed).forward
    # Positions by count.
    embed.forward = lambda ids: forward(embed, ids) + forward(embed, torch.arange(ids.shape[1])[None])
    monkeypatch.setattr(selfcheck, "TRIES", 4)
    with pytest.raises(ValueError, match="does not give the same logits"):
        selfcheck.entries_of([one])


def test_lanes_are_told_apart(tokenizer):
    """The error names the member that deviates."""
    model = build_model("llama", 0)
    members = [member(model, tokenizer), Member("second", model, tokenizer)]
    shared = share_forwards([model, model])
    assert shared[0] is shared[1]
    runner = make_fast(shared[0])
    for lane, each in enumerate(members):
        each.lane, each.shared = lane, runner
    assert len(selfcheck.entries_of(members)) == 2
    members[1].model = build_model("llama", 2)
    selfcheck._entries_by_model.clear()
    with pytest.raises(ValueError, match=r"^second: "):
        selfcheck.entries_of(members)


def without_weights():
    with torch.device("meta"):
        return build_model("llama", 0)


def of_several_dtypes():
    model = build_model("llama", 0)
    model.model.layers[0].to(torch.bfloat16)
    return model


def with_weights_of_8_bits():
    model = build_model("llama", 0)
    up = model.model.layers[0].mlp.up_proj
    up.weight.data = up.weight.data.to(torch.float8_e4m3fn)
    return model


def with_a_head_of_another_dtype():
    model = build_model("llama", 0).to(torch.bfloat16)
    model.lm_head.float()
    return model


@pytest.mark.parametrize(
    "broken", [without_weights, of_several_dtypes, with_weights_of_8_bits, with_a_head_of_another_dtype]
)
def test_models_that_do_not_run_by_themselves_are_named(tokenizer, tiny_model, broken):
    with pytest.raises(ValueError, match=r"helpful: expected a model that runs, .* raised \w+Error: "):
        GenARM.from_pretrained(tiny_model(), ARM(broken(), name="helpful"), tokenizer=tokenizer)


@pytest.mark.parametrize("how", ["cpu_offload", "disk"])
def test_weights_that_accelerate_brings_when_they_are_used(tokenizer, tiny_model, tmp_path, how):
    """Without accelerate's hooks all weights are on "meta"."""
    model = build_model("llama", 0)
    if how == "disk":
        model.save_pretrained(tmp_path)
        options = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off"), "dtype": torch.float32}
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    params = {"max_new_tokens": 8, "seed": 1, "ignore_eos": True}
    expected = GenARM.from_pretrained(tiny_model(), tiny_model(seed=1), tokenizer=tokenizer).generate(
        [5, 6, 7], **params
    )
    found = GenARM.from_pretrained(model, tiny_model(seed=1), tokenizer=tokenizer).generate([5, 6, 7], **params)
    assert found[0].token_ids == expected[0].token_ids
