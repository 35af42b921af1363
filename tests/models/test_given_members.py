"""Tests of models passed as members: changed ones, ones that are slow on a CPU, and objects of other types."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import pipeline

from genarm_fast import ARM, GenARM, reference
from genarm_fast.integrations.transformers import GenARMLogitsProcessor, guided
from genarm_fast.models import loader

PROMPT = {"prompts": [5, 6, 7], "max_new_tokens": 10, "seed": 1, "ignore_eos": True}


@pytest.mark.parametrize("cut", ["base", "arm", "both"])
def test_an_output_layer_that_is_narrower_than_its_config_says(tiny_model, tokenizer, cut):
    models = [copy.deepcopy(tiny_model(seed=seed)) for seed in (0, 1)]
    for model, name in zip(models, ("base", "arm")):
        if cut in (name, "both"):
            model.lm_head = torch.nn.Linear(32, 290, bias=False)
            torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    base, arm = models
    model = GenARM.from_pretrained(base, [ARM(arm, name="a")], tokenizer=tokenizer)
    assert model.vocab_size == 290
    params = {"temperature": 0.8, "repetition_penalty": 1.3, "max_new_tokens": 8}
    (output,) = model.generate([5, 6, 7], weights=0.7, seed=3, ignore_eos=True, **params)
    assert output.token_ids == reference.generate(base, [arm], [[5, 6, 7]] * 2, [0.7], seed=3, **params).tokens
    with pytest.raises(ValueError, match=r"responses\[0\]: token ids 295..295: expected 0..289"):
        model.score([5, 6, 7], [[295]])
    with pytest.raises(ValueError, match="stop_token_ids: token id 290: expected less than 290"):
        model.generate([5, 6, 7], stop_token_ids=[290])


@pytest.mark.parametrize("part", ["forward", "model.forward", "model", "layer", "in training", "compile()"])
def test_models_that_are_compiled_in_part(tiny_model, tokenizer, part):
    """Hugging Face's documentation compiles models by `model.forward = torch.compile(model.forward)`, for example."""
    base = copy.deepcopy(tiny_model())
    compiled = partial(torch.compile, backend="eager")
    if part in ("forward", "in training"):
        base.forward = compiled(base.forward)
        base.train(part == "in training")
    elif part == "model.forward":
        base.model.forward = compiled(base.model.forward)
    elif part == "model":
        base.model = compiled(base.model)
    elif part == "layer":
        base.model.layers[1] = compiled(base.model.layers[1])
    else:
        base.compile(backend="eager")
    model, plain = (
        GenARM.from_pretrained(each, [tiny_model(seed=1)], tokenizer=tokenizer) for each in (base, tiny_model())
    )
    assert model.generate(**PROMPT)[0].token_ids == plain.generate(**PROMPT)[0].token_ids
    torch.compiler.reset()


def test_float16_on_a_cpu_is_warned_of(tiny_model, tokenizer, caplog):
    base, arm = (copy.deepcopy(tiny_model(seed=seed)) for seed in (0, 1))
    GenARM.from_pretrained(base, [arm.bfloat16()], tokenizer=tokenizer)
    assert not caplog.records
    arms = [ARM(arm.half(), name="a"), ARM(base, name="b")]
    GenARM.from_pretrained(base, arms, tokenizer=tokenizer, draft_model=copy.deepcopy(base).half())
    (record,) = caplog.records
    start = "a, draft_model: float16 is slow on a CPU, prompts above all: expected dtype='bfloat16'"
    assert record.getMessage().startswith(start)


def test_float16_on_a_gpu_is_no_reason_to_warn(caplog):
    def member(name, device, dtype=torch.float16):
        return SimpleNamespace(name=name, model=SimpleNamespace(dtype=dtype), device=torch.device(device))

    loader._warn_of_float16([member("base", "cuda"), member("ours", "cpu", torch.bfloat16)])
    assert not caplog.records
    loader._warn_of_float16([member("base", "cuda"), member("arm", "cpu")])
    (record,) = caplog.records
    assert record.getMessage().startswith("arm: float16")


def test_what_is_no_member_is_shown_in_one_line(tiny_model, tokenizer):
    """The `repr` of a model has a line for each of its modules, too many for an error."""
    model = tiny_model()
    hint = r"; ARM\(model, weight=..., name=...\) takes an ARM's weight and name"
    expected = "a hub id, a folder or a loaded model"
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    cases = [
        (
            lambda: GenARM.from_pretrained(model, {"kind": model}),
            rf"arms=\{{'kind': Llama.*: expected an ARM, .*{hint}",
        ),
        (
            lambda: GenARM.from_pretrained(model, [model, (model, 0.5)]),
            rf"arms\[1\]=\(Llama.*: expected an ARM, {expected}{hint}",
        ),
        (
            lambda: GenARM.from_pretrained(model, [pipe]),
            rf"arms\[0\]=TextGenerationPipeline.*: expected an ARM, {expected}",
        ),
        (lambda: GenARM.from_pretrained(pipe), f"base=TextGenerationPipeline.*: expected {expected}"),
        (lambda: ARM((model,)), rf"model=\(Llama.*: expected {expected}"),
        (lambda: ARM("x", base=(model,)), rf"base=\(Llama.*: expected {expected}"),
        (lambda: GenARM.from_pretrained(model, tokenizer=model), "tokenizer=Llama.*: expected a loaded tokenizer"),
        (lambda: GenARMLogitsProcessor(pipe, []), "base=TextGenerationPipeline.*: expected the loaded model"),
        (lambda: guided([], streamer=model), "streamer=Llama.*: expected one of transformers' streamers"),
    ]
    for call, message in cases:
        with pytest.raises(TypeError, match=f"^{message}$|^{message}") as raised:
            call()
        assert len(str(raised.value)) < 270
        assert "\n" not in str(raised.value)
