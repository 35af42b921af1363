"""Σ log π of responses: every path equals the model's own logits, and LoRA adapts the modules asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from genarm_fast.train import TrainConfig
from genarm_fast.train.batches import rows, shared
from genarm_fast.train.encode import Encoded
from genarm_fast.train.model import PairModel, add_lora, choose_dtype, choose_paths, load_base

MakeModel = Callable[..., PreTrainedModel]
PAIRS = [
    Encoded(0, [10, 11, 12], [20, 21, 22, 1], [30, 1]),
    Encoded(1, [13], [22, 1], [31, 32, 33, 34, 1]),
    Encoded(2, [14, 15, 16, 17, 18], [40, 41, 42, 43, 44, 45, 46, 1], [50, 51, 52, 53, 54, 55, 1]),
]


def by_hand(lm: torch.nn.Module, pairs: list[Encoded]) -> Tensor:
    """Return Σ log π of each response, float64, one sequence at a time from the model's own logits."""
    sums = []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            ids = torch.tensor([pair.prompt + getattr(pair, side)])
            logps = lm(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            tokens = logps.gather(-1, ids[0, 1:, None])[len(pair.prompt) - 1 :]
            sums.append(tokens.sum())
    return torch.stack(sums)


FAMILIES = {
    "llama": ("llama", {}, "shared", True),
    "tied": ("llama", {"tie_word_embeddings": True}, "shared", True),
    "eager": ("llama", {"attn_implementation": "eager"}, "shared", True),
    "qwen3": ("qwen3", {}, "shared", True),
    "gpt2": ("gpt2", {}, "shared", True),
    "sliding window": ("mistral", {}, "rows", True),
    "soft-capped": ("gemma2", {"final_logit_softcapping": 2.0}, "rows", True),
    "scaled up": ("cohere", {"logit_scale": 3.0}, "shared", True),
    "scaled down": ("granite", {"logits_scaling": 4.0}, "shared", True),
    "no positions": ("bloom", {}, "rows", True),
    "bias": ("phi", {}, "shared", True),
}


def build(tiny_model: MakeModel, family: str, options: dict[str, Any]) -> PreTrainedModel:
    if family not in ("cohere", "granite", "bloom", "phi"):
        return copy.deepcopy(tiny_model(family, **options))
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.3}
    if family == "bloom":
        sizes = {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **options))
    if family == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    return model.eval()


@pytest.mark.parametrize(("family", "options", "layout", "fused"), FAMILIES.values(), ids=FAMILIES)
def test_equals_the_models_own_logits(
    tiny_model: MakeModel, family: str, options: dict[str, Any], layout: str, fused: bool
) -> None:
    """Values and gradients agree, in the layout and output path chosen for this family."""
    lm = build(tiny_model, family, options)
    model = PairModel(lm).eval()
    assert choose_paths(model, PAIRS) == (layout, fused)
    found = model(**(shared if layout == "shared" else rows)(PAIRS, 0))
    wanted = by_hand(lm, PAIRS)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    coefficients = torch.linspace(-1, 1, len(wanted))
    parameters = list(lm.parameters())
    ours = torch.autograd.grad(found @ coefficients, parameters, allow_unused=True)
    theirs = torch.autograd.grad(wanted @ coefficients.double(), parameters, allow_unused=True)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_an_unknown_output_falls_back_to_full_logits(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe finds a model that changes its logits in ways its config does not tell."""
    lm = copy.deepcopy(tiny_model())
    plain = type(lm).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    monkeypatch.setattr(type(lm), "forward", forward)
    model = PairModel(lm)
    assert choose_paths(model, PAIRS) == ("shared", False)
    torch.testing.assert_close(model(**shared(PAIRS, 0)).double(), by_hand(lm, PAIRS), rtol=1e-5, atol=1e-4)


def test_a_model_that_ignores_masks_gets_rows(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is the probe's negative control: without the 4-D mask the layouts disagree, and "shared" is not chosen."""
    lm = copy.deepcopy(tiny_model())
    decoder = type(lm.model)
    plain = decoder.forward

    def forward(self: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        own = attention_mask is not None and attention_mask.ndim == 4
        return plain(self, *args, attention_mask=None if own else attention_mask, **kwargs)

    def signature_of_plain(self: Any, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(self, input_ids=input_ids, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(decoder, "forward", signature_of_plain)
    assert choose_paths(PairModel(lm), PAIRS)[0] == "rows"


def test_lora_on_the_output_layer(tiny_model: MakeModel) -> None:
    """With LoRA the output is no plain matrix, so the model's own logits are used."""
    lora = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    lm = peft.get_peft_model(copy.deepcopy(tiny_model()), lora).eval()
    model = PairModel(lm)
    assert choose_paths(model, PAIRS) == ("shared", False)
    torch.testing.assert_close(model(**shared(PAIRS, 0)).double(), by_hand(lm, PAIRS), rtol=1e-5, atol=1e-4)


def make(base: Path, **options: Any) -> TrainConfig:
    return TrainConfig(base=str(base), data="d", output="o", **options)


@pytest.mark.parametrize(("cap", "expected"), [(0.5, "eager"), (None, "sdpa")])
def test_capped_attention_is_trained_with_its_cap(
    tiny_model: MakeModel, tmp_path: Path, cap: float | None, expected: str
) -> None:
    """Serving applies the cap too. PyTorch's own attention leaves it out, which changes these log-probabilities."""
    tiny_model("gemma2", attn_logit_softcapping=cap).save_pretrained(tmp_path)
    model = PairModel(load_base(make(tmp_path), torch.float32)).eval()
    assert model.causal.config._attn_implementation == expected
    choose_paths(model, PAIRS)
    found = model(**rows(PAIRS, 0)).double()
    for implementation in ("eager", "sdpa"):
        lm = copy.deepcopy(tiny_model("gemma2", attn_logit_softcapping=cap))
        lm.set_attn_implementation(implementation)
        same = torch.allclose(found, by_hand(lm, PAIRS), rtol=1e-5, atol=1e-4)
        assert same == (cap is None or implementation == "eager")


def adapted(lm: torch.nn.Module) -> set[str]:
    return {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in lm.named_parameters() if ".lora_A" in name}


def test_lora_targets(base: Path) -> None:
    """LoRA adapts every linear layer except the output by default, otherwise the named ones. Unknown names are
    refused."""
    load = lambda: load_base(make(base), torch.float32)  # noqa: E731
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted(add_lora(load(), make(base))) == every
    some = add_lora(
        load(), make(base, lora_targets=("q_proj", "o_proj"), lora_rank=3, lora_alpha=6.0, lora_dropout=0.2)
    )
    assert adapted(some) == {"q_proj", "o_proj"}
    layer: Any = some.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (3, 2.0, 0.2)
    trained = {name for name, p in some.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)


def test_conv1d_models_take_lora(tiny_model: MakeModel, tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    assert adapted(add_lora(load_base(make(tmp_path), torch.float32), make(tmp_path))) == {"c_attn", "c_proj", "c_fc"}


def test_dtype() -> None:
    assert choose_dtype("float16") == torch.float16
    assert choose_dtype("auto") in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("bf16", "chosen"), [(0.5, torch.bfloat16), (0.9, torch.float32), (2.0, torch.float32)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the choice on a CPU")
def test_auto_dtype_is_the_faster_one(monkeypatch: pytest.MonkeyPatch, bf16: float, chosen: torch.dtype) -> None:
    """bfloat16 must be clearly faster, since it is less exact."""
    seconds = {torch.float32: 1.0, torch.bfloat16: bf16}
    monkeypatch.setattr("genarm_fast.train.model._matmul_seconds", seconds.__getitem__)
    assert choose_dtype("auto") == chosen


@pytest.mark.parametrize(("able", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_of_a_gpu(monkeypatch: pytest.MonkeyPatch, able: bool, chosen: torch.dtype) -> None:
    """Emulated bfloat16, as before sm_80, does not count."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or able)
    assert choose_dtype("auto") == chosen
