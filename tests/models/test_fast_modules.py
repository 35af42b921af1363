"""Runners compute what their models compute, by faster means."""

from __future__ import annotations

import pytest
import torch
from against_reference import assert_equals_reference
from tiny_models import FAMILIES, LAYERS, build_model, build_tokenizer
from torch.nn.utils import prune
from transformers import AutoConfig, AutoModelForCausalLM

from genarm_fast import GenARM
from genarm_fast.kernels import _native
from genarm_fast.kernels.small_linear import SmallLinear
from genarm_fast.models.fast_modules import _fast
from genarm_fast.models.weights import share_weights

pytestmark = pytest.mark.skipif(_native.core is None, reason="needs the C++ core")
REPLACED = {  # number of modules of each kind per layer, and outside of layers
    "llama": {"Linear": 7, "LlamaRMSNorm": 2, "LlamaAttention": 1, "LlamaMLP": 1},
    "mistral": {"Linear": 7, "MistralRMSNorm": 2, "MistralAttention": 1, "MistralMLP": 1},
    "qwen2": {"Linear": 7, "Qwen2RMSNorm": 2, "Qwen2Attention": 1, "Qwen2MLP": 1},
    "qwen3": {"Linear": 7, "Qwen3RMSNorm": 4, "Qwen3Attention": 1, "Qwen3MLP": 1},
    "gemma2": {"Linear": 7, "Gemma2RMSNorm": 4, "Gemma2Attention": 1},
    "gemma3_text": {"Linear": 7, "Gemma3RMSNorm": 6, "Gemma3Attention": 1},
    "gpt2": {},
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_parts_are_replaced_by_equal_ones(family):
    model = share_weights(build_model(family, 0)).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.randn(parameter.shape))
    counts: dict[str, int] = {}
    for module in model.modules():
        fast = _fast(module)
        if fast is None:
            continue
        kind = type(module).__name__
        counts[kind] = counts.get(kind, 0) + 1
        if kind == "Linear":
            assert isinstance(fast, SmallLinear)
        elif kind.endswith("MLP"):
            x = torch.randn(3, 2, 32, dtype=torch.bfloat16)
            torch.testing.assert_close(fast(x), module(x))
        elif kind.endswith("RMSNorm"):
            x = torch.randn(3, 2, module.weight.numel(), dtype=torch.bfloat16)
            assert torch.equal(fast(x), module(x))
    layers = model.config.num_hidden_layers
    expected = {kind: count * layers for kind, count in REPLACED[family].items()}
    if expected:
        norm = next(kind for kind in expected if kind.endswith("RMSNorm"))
        expected |= {"Linear": expected["Linear"] + 1, norm: expected[norm] + 1}
    else:
        expected = {"Linear": 1}
    assert counts == expected


@torch.inference_mode()
def test_a_partial_rotation_is_kept():
    """Nemotron's attention rotates only some dimensions."""
    assert not any(type(module).__name__ == "NemotronAttention" and _fast(module) for module in nemotron().modules())
    model = GenARM.from_pretrained(nemotron(), tokenizer=build_tokenizer())
    output = model.generate([5, 6, 7], max_new_tokens=8, seed=1)[0]
    assert_equals_reference(model, output, max_new_tokens=8, weights=[])


def nemotron():
    config = {**LAYERS, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300, "initializer_range": 0.3}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("nemotron", **config), dtype=torch.float32).eval()


@torch.inference_mode()
def test_a_norm_that_rounds_elsewhere_is_kept():
    class OddRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.rand(8)), 1e-6

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 2 * self.eps) * self.weight * 1.001

    assert _fast(OddRMSNorm()) is None


@pytest.mark.parametrize("how", ["hook", "hook before", "patch"])
def test_an_activation_that_somebody_changed(how):
    """`silu_mul` would compute a different activation."""
    base, arm = build_model("llama", 0), build_model("llama", 1)
    activation = base.model.layers[0].mlp.act_fn
    if how == "hook":
        activation.register_forward_hook(lambda module, inputs, output: output * 1.003)
    elif how == "hook before":
        activation.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.003,))
    else:
        activation.forward = torch.tanh
    tree = share_weights(base)
    assert _fast(tree.model.layers[0].mlp) is None
    assert _fast(tree.model.layers[1].mlp) is not None
    model = GenARM.from_pretrained(base, arm, tokenizer=build_tokenizer())
    (output,) = model.generate([5, 6, 7], max_new_tokens=8, seed=1, ignore_eos=True, logprobs=0)
    assert_equals_reference(model, output, max_new_tokens=8, weights=[1.0], ignore_eos=True)


@pytest.mark.parametrize(
    "computed",
    [
        lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
        lambda linear: torch.nn.utils.weight_norm(linear),
        lambda linear: torch.nn.utils.spectral_norm(linear).eval(),
    ],
    ids=["prune", "weight_norm", "spectral_norm"],
)
def test_weights_that_a_hook_computes(computed):
    """The weights are no parameters, and `copy.deepcopy` refuses them. Changes of their sources count."""
    for dtype in (torch.float32, torch.bfloat16):
        linear = torch.nn.Linear(32, 32, dtype=dtype)
        assert _fast(linear) is not None
        computed(linear)
        assert _fast(linear) is None
    base, arm = build_model("llama", 0), build_model("llama", 1)
    computed(base.model.layers[0].self_attn.q_proj)
    model = GenARM.from_pretrained(base, arm, tokenizer=build_tokenizer())
    for _ in range(2):
        (output,) = model.generate([5, 6, 7], max_new_tokens=8, seed=1, ignore_eos=True, logprobs=0)
        assert_equals_reference(model, output, max_new_tokens=8, weights=[1.0], ignore_eos=True)
        with torch.no_grad():
            for parameter in base.model.layers[0].self_attn.q_proj.parameters():
                parameter += 0.2


def test_a_norm_whose_weight_a_hook_computes():
    norm = build_model("llama", 0).model.norm
    assert _fast(norm) is not None
    prune.l1_unstructured(norm, "weight", 0.5)
    assert _fast(norm) is None
