"""The same weights give the same fingerprint in any precision or wrapping; other weights give another one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from genarm_fast.models.fingerprint import fingerprint

MakeModel = Callable[..., PreTrainedModel]


def with_lora(model: PreTrainedModel, **options: object) -> peft.PeftModel:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)  # type: ignore[arg-type]
    return peft.get_peft_model(copy.deepcopy(model), config)


def test_is_short_hex_and_repeatable(tiny_model: MakeModel) -> None:
    print_ = fingerprint(tiny_model())
    assert print_ is not None
    assert len(print_) == 16
    assert int(print_, 16) >= 0
    assert fingerprint(copy.deepcopy(tiny_model())) == print_


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_precision_of_loading_does_not_matter(tiny_model: MakeModel, family: str) -> None:
    stored = copy.deepcopy(tiny_model(family)).to(torch.bfloat16)
    prints = {fingerprint(copy.deepcopy(stored).to(dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float16)}
    assert len(prints) == 1
    # A float32 checkpoint, loaded as it is and in bfloat16.
    assert fingerprint(tiny_model(family)) in prints


def test_saved_and_loaded(tiny_model: MakeModel, tmp_path: object) -> None:
    tiny_model().save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == fingerprint(tiny_model())


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
def test_lora_does_not_matter_until_merged(tiny_model: MakeModel, options: dict[str, object]) -> None:
    wrapped = with_lora(tiny_model(), **options)
    assert fingerprint(wrapped) == fingerprint(tiny_model())
    assert fingerprint(wrapped.get_base_model()) == fingerprint(tiny_model())
    assert fingerprint(wrapped.merge_and_unload()) != fingerprint(tiny_model())


def test_more_vocabulary_rows_do_not_matter(tiny_model: MakeModel) -> None:
    """The case is a pad token added to a vocabulary of more rows than the fingerprint samples."""
    model = copy.deepcopy(tiny_model(vocab_size=1100))
    before = fingerprint(model)
    model.resize_token_embeddings(1101, mean_resizing=False)
    assert fingerprint(model) == before


def test_other_weights_differ(tiny_model: MakeModel) -> None:
    prints = [fingerprint(tiny_model(seed=seed)) for seed in range(3)]
    prints += [fingerprint(tiny_model("qwen2")), fingerprint(tiny_model(num_hidden_layers=3))]
    assert len(set(prints)) == len(prints)


def test_fine_tuning_any_layer_differs(tiny_model: MakeModel) -> None:
    names = {name for name, weight in tiny_model().named_parameters() if weight.ndim == 2}
    assert len(names) == 16
    for name in names:
        model = copy.deepcopy(tiny_model())
        with torch.no_grad():
            model.get_parameter(name).mul_(1.05)
        assert fingerprint(model) != fingerprint(tiny_model()), name


def test_unreadable_weights_give_none(tiny_model: MakeModel) -> None:
    with torch.device("meta"):
        assert fingerprint(AutoModelForCausalLM.from_config(tiny_model().config)) is None
    quantised = copy.deepcopy(tiny_model())
    layer = quantised.get_submodule("model.layers.0.mlp.down_proj")
    layer.weight = torch.nn.Parameter(torch.zeros(32, 32, dtype=torch.uint8), requires_grad=False)
    assert fingerprint(quantised) is None
    assert fingerprint(torch.nn.Identity()) is None


def test_quantised_models_have_none(tiny_model):
    """Quantised tensors may look like floating-point ones."""
    model = copy.copy(tiny_model())
    assert fingerprint(model) is not None
    model.hf_quantizer = object()
    assert fingerprint(model) is None
