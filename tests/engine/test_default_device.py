"""The host's tensors stay on the host whatever device `torch.set_default_device` names."""

from __future__ import annotations

import asyncio

import pytest
import torch
from tiny_models import build_model, build_tokenizer, save_adapter
from transformers import LogitsProcessorList

from genarm_fast import GenARM, functional
from genarm_fast.integrations.transformers import GenARMLogitsProcessor

PARAMS = {"max_new_tokens": 8, "seed": 3, "ignore_eos": True, "repetition_penalty": 1.1, "top_p": 0.9, "logprobs": 2}
PROMPTS = [[5, 6, 7, 100, 42], [9]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    build_model("llama", 0).save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    save_adapter(folder / "arm", base=folder / "base", seed=1)
    return folder / "base", folder / "arm"


@pytest.fixture(scope="module")
def loaded(folders):
    return GenARM.from_pretrained(*folders)


def tokens(outputs):
    return [output.token_ids for output in outputs]


CALLS = {
    "generate": lambda model, folders: tokens(model.generate(PROMPTS, **PARAMS)),
    "stream": lambda model, folders: streamed(model),
    "agenerate": lambda model, folders: tokens(asyncio.run(model.agenerate(PROMPTS, **PARAMS))),
    "drafts": lambda model, folders: tokens(model.generate(PROMPTS, speculation="auto", **PARAMS)),
    "score": lambda model, folders: [each.base_logprobs for each in model.score(PROMPTS, [[9, 8], [7]])],
    "warm_up": lambda model, folders: model.warm_up() or tokens(model.generate(PROMPTS, **PARAMS)),
    "loading": lambda model, folders: tokens(
        GenARM.from_pretrained(*folders, device="cpu").generate(PROMPTS, **PARAMS)
    ),
    "function": lambda model, folders: tokens(functional.generate(*folders, PROMPTS, device="cpu", **PARAMS)),
    "processor": lambda model, folders: scores(folders),
}


def streamed(model):
    with model.stream(PROMPTS, **PARAMS) as stream:
        next(stream)
        stream.set_weights([0.3])
        list(stream)
    return tokens(stream.outputs)


def scores(folders):
    base = build_model("llama", 0) if torch.get_default_device().type == "cpu" else BASE[0]
    BASE.append(base)
    processor = GenARMLogitsProcessor(base, folders[1], tokenizer=build_tokenizer(), pad_token_id=0)
    rows = processor.start(PROMPTS)["input_ids"]
    with torch.device("cpu"):
        given = torch.linspace(-1, 1, 600).reshape(2, 300)
    return LogitsProcessorList([processor])(rows, given).tolist()


BASE: list[torch.nn.Module] = []  # transformers can't build a model on "meta", so one is made before


@pytest.mark.parametrize("call", CALLS)
def test_every_call(loaded, folders, call):
    """The device "meta" stands for a GPU: a tensor made there by mistake has no numbers."""
    expected = CALLS[call](loaded, folders)
    torch.set_default_device("meta")
    try:
        assert CALLS[call](loaded, folders) == expected
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)
