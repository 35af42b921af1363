"""A self-check of one layer per kind refuses every model that a check of all layers refuses, and finds the same
entries."""

from __future__ import annotations

from types import MethodType

import odd_layers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_selfcheck import member
from tiny_models import FAMILIES, MIXTURES, build_model
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from genarm_fast import GenARM
from genarm_fast.engine import layer_code, selfcheck
from genarm_fast.engine.layer_kinds import kinds_of_layers
from genarm_fast.models.one_call import OneCall
from genarm_fast.models.weights import share_weights

COUNT = 8
REFUSAL = "does not give the same logits over a static cache"


def build(family="llama", seed=0, **config):
    return build_model(family, seed, num_hidden_layers=COUNT, **config)


@pytest.fixture(params=["a stranger's", "as if of transformers"])
def whose(request, monkeypatch):
    """The origin of the odd layers. A stranger's code is never trusted; code read like transformers' is judged by its
    source."""
    if request.param != "a stranger's":
        monkeypatch.setattr(layer_code, "READ_PACKAGES", ("transformers", "odd_layers"))


@torch.inference_mode()
def whole(members):
    """Return what each layer caches, from a comparison of all layers."""
    return selfcheck._check_all_layers(members)


@torch.inference_mode()
def by_kinds(members):
    """Return what each layer caches, from a comparison of one layer per kind."""
    return selfcheck._check_by_kinds(members)


def of_class(model, name, kind, layers=range(COUNT)):
    for i in layers:
        getattr(model.model.layers[i], name).__class__ = kind


def one_of_another_class(model, _):
    of_class(model, "mlp", odd_layers.OddMLP, [5])


def one_with_an_attribute(model, _):
    of_class(model, "mlp", odd_layers.FlaggedMLP)
    model.model.layers[4].mlp.odd = True


def every_second(model, _):
    of_class(model, "self_attn", odd_layers.EverySecond)


def the_last(model, _):
    of_class(model, "self_attn", odd_layers.Last)


def one_in_a_list(model, _):
    of_class(model, "self_attn", odd_layers.Listed)
    model.config.odd = [i == 3 for i in range(COUNT)]


def one_that_reads_anothers_cache(model, _):
    of_class(model, "self_attn", odd_layers.ReadsAnother)


def one_in_eight_calls(model, _):
    of_class(model, "mlp", odd_layers.Remembers)


def the_decoder_knows(model, _):
    model.model.__class__ = odd_layers.IndexedDecoder


def an_attention_function_knows(model, monkeypatch):
    def attend(module, *args, **kwargs):
        output, weights = sdpa_attention_forward(module, *args, **kwargs)
        return output * (1 + (module.layer_idx == 2)), weights

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", attend)


def an_attention_function_of_its_own(model, monkeypatch):
    an_attention_function_knows(model, monkeypatch)
    own = AttentionInterface._global_mapping["sdpa"]
    monkeypatch.setitem(AttentionInterface._global_mapping, "own", own)
    model.config._attn_implementation = "own"


def a_patched_class(model, monkeypatch):
    forward = LlamaAttention.forward

    def patched(self, *args, **kwargs):
        output, weights = forward(self, *args, **kwargs)
        return output + output.shape[1] * (self.layer_idx == 2), weights

    monkeypatch.setattr(LlamaAttention, "forward", patched)


def a_hook(model, _):
    model.model.layers[3].mlp.register_forward_hook(lambda module, args, output: odd_layers.counted(output))


def a_forward_of_its_own(model, _):
    mlp = model.model.layers[3].mlp
    mlp.forward = MethodType(lambda self, x: odd_layers.counted(LlamaMLP.forward(self, x)), mlp)


WRONG = [
    *(
        one_of_another_class,
        one_with_an_attribute,
        every_second,
        the_last,
        one_in_a_list,
        one_that_reads_anothers_cache,
    ),
    *(one_in_eight_calls, the_decoder_knows, an_attention_function_knows, an_attention_function_of_its_own),
    *(a_patched_class, a_hook, a_forward_of_its_own),
]


@pytest.mark.parametrize("change", WRONG)
@pytest.mark.usefixtures("whose")
def test_what_is_wrong_in_some_layers_is_refused(tokenizer, monkeypatch, change):
    model = build()
    change(model, monkeypatch)
    with pytest.raises(ValueError, match=REFUSAL):
        GenARM.from_pretrained(model, tokenizer=tokenizer)
    if change not in (the_last, one_in_eight_calls):  # the first and the last layer are right
        monkeypatch.setattr(selfcheck, "kinds_of_layers", lambda models, runner: [0] * COUNT)
        assert selfcheck.entries_of([member(model, tokenizer)])


def test_a_layer_of_ours_that_is_wrong_is_refused(tokenizer):
    one = member(build(), tokenizer)
    fused = one.runner.base_model.forward
    assert one.runs_by.startswith("fused")
    fused.layers[5].scale *= 3
    fused.one_call = OneCall(fused.layers, fused.next_norms, [()])
    with pytest.raises(ValueError, match=REFUSAL):
        selfcheck.entries_of([one])


def kinds(*members):
    models = [each.model for each in members]
    found = kinds_of_layers(models, members[0].shared if len(members) > 1 else members[0].runner)
    return None if found is None else [found.index(kind) for kind in found]


KINDS = {
    "llama": [0] * COUNT,
    "mistral": [0] * COUNT,
    "qwen2": [0] * COUNT,
    "qwen3": [0] * COUNT,
    "gpt2": None,  # gpt2 can scale attention by the layer's number
    "gemma2": [0, 1] * 4,
    "gemma3_text": [0, 0, 0, 0, 0, 5, 0, 0],
    "qwen2_moe": [0] * COUNT,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_supported_families(tokenizer, family, dtype, monkeypatch):
    """The check compares layers of each kind, and compares nothing twice."""
    one = member(build(family).to(dtype), tokenizer)
    assert kinds(one) == KINDS[family]
    sizes, deviations = [], selfcheck.deviations

    def counted(members, *args):
        decoder = members[0].model.base_model
        sizes.append(len(decoder.h if family == "gpt2" else decoder.layers))
        return deviations(members, *args)

    monkeypatch.setattr(selfcheck, "deviations", counted)
    found = selfcheck.entries_of([one])
    assert sizes == [COUNT if KINDS[family] is None else len({*KINDS[family], COUNT - 1})]
    assert found == whole([one])
    assert len(getattr(one.model.base_model, "h" if family == "gpt2" else "layers")) == COUNT


def test_what_makes_a_kind(tokenizer):
    def after(change):
        model = build("qwen2")
        change(model)
        return kinds(member(model, tokenizer))

    def types(model):
        model.config.layer_types, model.config.sliding_window = ["full_attention"] * 7 + ["sliding_attention"], 4
        model.model.has_sliding_layers = True

    def wider(model):
        mlp = model.model.layers[2].mlp
        mlp.up_proj, mlp.gate_proj = torch.nn.Linear(32, 72, bias=False), torch.nn.Linear(32, 72, bias=False)
        mlp.down_proj = torch.nn.Linear(72, 32, bias=False)

    def strided(model):
        weight = model.model.layers[2].mlp.up_proj.weight
        weight.data = weight.data.T.contiguous().T

    def window(model):
        model.model.layers[3].self_attn.sliding_window = 4

    def moved(model):
        model.model.layers[3].self_attn.layer_idx = 2

    def another_activation(model):
        model.model.layers[6].mlp.act_fn = torch.nn.GELU()

    def shared(model):
        model.model.layers[5].mlp = model.model.layers[4].mlp

    def tied(model):
        model.model.layers[5].mlp.up_proj.weight = model.model.layers[4].mlp.up_proj.weight

    def two_lists(model):
        model.model.more = torch.nn.ModuleList()

    assert after(types) == [0] * 7 + [7]
    assert after(wider) == after(strided) == [0, 0, 2, 0, 0, 0, 0, 0]
    assert after(window) == after(moved) == [0, 0, 0, 3, 0, 0, 0, 0]
    assert after(another_activation) == [0] * 6 + [6, 0]
    assert after(shared) is after(tied) is after(two_lists) is None


def test_entries_are_right_where_layers_have_others(tokenizer):
    model = build("gemma2")
    model.model.layers[5] = build("gemma2", num_key_value_heads=4).model.layers[5]
    model.model.layers[5].self_attn.config = model.config
    one = member(model, tokenizer)
    found = by_kinds([one])
    assert [entry.heads for entry in found] == [2] * 5 + [4, 2, 2]
    assert found == whole([one])


def adapted(base, layers=None):
    config = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=layers, init_lora_weights=False)
    return get_peft_model(share_weights(base), config).eval()


def test_adapters_make_kinds(tokenizer):
    """Layers of members that share a forward form kinds together."""
    base = build()
    for layers, expected in ((None, [0] * COUNT), ([2, 3], [0, 0, 2, 2, 0, 0, 0, 0])):
        model = GenARM.from_pretrained(base, [adapted(base, layers)], tokenizer=tokenizer)
        assert model.base.shared is model.arms[0].shared
        assert kinds(*model.members) == expected
        assert by_kinds(model.members) == whole(model.members)


def test_a_wrong_adapter_of_some_layers_is_refused(tokenizer):
    base = build()
    model = GenARM.from_pretrained(base, [adapted(base, [2, 3])], tokenizer=tokenizer)
    model.arms[0].model.model.layers[2].self_attn.q_proj.scaling["default"] *= 3  # the runner keeps the old scaling
    selfcheck._entries_by_model.clear()
    with pytest.raises(ValueError, match=f"^arm: .*{REFUSAL}"):
        selfcheck.entries_of(model.members)
