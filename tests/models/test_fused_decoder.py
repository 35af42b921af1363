"""Where the fused decoder runs, it gives the bits of transformers' own forward."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from peft import LoraConfig
from tiny_models import FAMILIES, MIXTURES, VOCAB_SIZE, build_model, save_adapter
from transformers.models.llama import modeling_llama

from genarm_fast import GenARM
from genarm_fast.engine.model_runner import ModelRunner
from genarm_fast.kernels import _native
from genarm_fast.models import fast_modules
from genarm_fast.models.fast_modules import make_fast
from genarm_fast.models.fused_decoder import WINDOWS
from genarm_fast.models.known_decoders import head_of
from genarm_fast.models.member import Member
from genarm_fast.models.weights import share_weights

pytestmark = pytest.mark.skipif(_native.core is None, reason="needs the C++ core")
SLOTS, CAPACITY = 3, 24


def is_fused(model) -> bool:
    return "forward" in vars(model.base_model)


def logits_of(members):
    """Return logits of rows of different lengths that are prefilled, fed blocks and rolled back, beyond a window of
    8."""
    runner, lanes = ModelRunner(members), range(len(members))
    runner.refresh()
    runner.discover(SLOTS, CAPACITY)
    tokens = torch.arange(len(members) * 2 * CAPACITY).view(len(members), 2, CAPACITY) * 7 % VOCAB_SIZE
    found = []
    for start, width, rows in ((0, 6, 2), (6, 1, 2), (7, 5, 2), (9, 3, 1), (12, 10, 2), (22, 1, 1)):
        where = torch.arange(start, start + width).expand(len(members), rows, width)
        block = tokens[:, :rows, start : start + width]
        if start == 0:
            runner.prefill(block, where, [2, 0], width, lanes)
        else:
            found += runner.forward(block, where, [2, 0][:rows], start + width, lanes)
    return found


def plainly(monkeypatch):
    monkeypatch.setattr(fast_modules, "fused_forward", lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
@torch.inference_mode()
def test_bits_of_families(tokenizer, monkeypatch, family, dtype):
    model = build_model(family, 0).to(dtype)
    fused = Member("base", model, tokenizer)
    expected = {name.lower() for name in WINDOWS}
    assert is_fused(fused.runner) == (family in expected)
    plainly(monkeypatch)
    plain = Member("base", model, tokenizer)
    assert not is_fused(plain.runner)
    assert all(torch.equal(*pair) for pair in zip(logits_of([fused]), logits_of([plain]), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_bits_of_lanes(tmp_path, tokenizer, monkeypatch, dtype):
    """The adapters target different linears, and the base has none."""
    base = tmp_path / "base"
    build_model("llama", 0).save_pretrained(base)
    tokenizer.save_pretrained(base)
    for name, targets in (("one", ["q_proj", "k_proj", "down_proj"]), ("two", ["o_proj", "q_proj", "v_proj"])):
        save_adapter(tmp_path / name, base=base, seed=len(name), config=LoraConfig(r=4, target_modules=targets))

    def members(*arms):
        return GenARM.from_pretrained(base, [tmp_path / arm for arm in arms], dtype=dtype).members

    fused = members("one", "two")
    assert is_fused(fused[0].shared)
    assert is_fused(fused[1].runner)  # alone, over PEFT's modules
    plainly(monkeypatch)
    plain = members("one", "two")
    assert not is_fused(plain[0].shared)
    for lanes in ([0, 1, 2], [0, 2], [1, 2], [1]):
        pairs = zip(logits_of([fused[i] for i in lanes]), logits_of([plain[i] for i in lanes]), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def listening(model):
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: None)


def with_a_forward_of_its_own(model):
    layer = model.model.layers[1]
    layer.forward = MethodType(type(layer).forward, layer)


def of_another_class(model):
    class Layer(modeling_llama.LlamaDecoderLayer):
        pass

    model.model.layers[0].__class__ = Layer


def with_another_activation(model):
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()


def shorter(model):
    model.config.num_hidden_layers = 1


@pytest.mark.parametrize(
    "change", [hooked, listening, with_a_forward_of_its_own, of_another_class, with_another_activation, shorter]
)
def test_what_is_unusual_keeps_its_own(change):
    model = share_weights(build_model("llama", 0))
    change(model)
    assert not is_fused(make_fast(model))


def test_a_class_that_was_changed_keeps_its_own(monkeypatch):
    """The trial finds the change: a class keeps its name when its forward changes."""
    forward = modeling_llama.LlamaDecoderLayer.forward
    monkeypatch.setattr(
        modeling_llama.LlamaDecoderLayer, "forward", lambda self, *args, **kwargs: 1.01 * forward(self, *args, **kwargs)
    )
    assert not is_fused(make_fast(share_weights(build_model("llama", 0))))


@torch.inference_mode()
def test_the_head_alone_runs_where_the_forward_has_nothing_else(tokenizer, monkeypatch):
    """The forward of a known LM is skipped if its class, hooks and methods show that it only applies the head."""
    runner = Member("base", build_model("llama", 0), tokenizer).runner
    assert head_of(runner) is runner.lm_head
    called = logits_of([Member("base", build_model("llama", 0), tokenizer)])
    member = Member("base", build_model("llama", 0), tokenizer)
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", lambda *_, **__: pytest.fail("it was called"))
    found = logits_of([member])
    assert all(torch.equal(a, b) for ours, theirs in zip(found, called) for a, b in zip(ours, theirs))


def test_a_forward_that_may_do_more_is_called(tokenizer, monkeypatch):
    class Capped(modeling_llama.LlamaForCausalLM):
        """A user's own LM class that caps its logits."""

    others = [build_model("gemma2", 0), build_model("llama", 0), build_model("llama", 0), build_model("llama", 0)]
    others[1].__class__ = Capped
    runners = [Member("base", model, tokenizer).runner for model in others]
    runners[2].register_forward_hook(lambda module, given, out: out)
    runners[3].forward = runners[3].forward
    assert [head_of(runner) for runner in runners] == [None] * 4
    plainly(monkeypatch)
    # Where the decoder keeps its own forward, the LM's forward is called too.
    assert head_of(Member("base", build_model("llama", 0), tokenizer).runner) is None
