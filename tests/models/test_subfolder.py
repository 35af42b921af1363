"""`subfolder=`: models and tokenizers in a folder inside the folder or repository that the caller names."""

from __future__ import annotations

import json
import re

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from tiny_models import build_model, build_tokenizer, save_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from genarm_fast import GenARM, functional, reference

PROMPT = {"max_new_tokens": 8, "seed": 1, "ignore_eos": True}
COMMIT = "0123456789" * 4


def put(folder, seed):
    build_model("llama", seed).save_pretrained(folder)
    build_tokenizer(add_bos=seed % 2 == 1).save_pretrained(folder)
    return folder


def tokens(model):
    return model.generate("the cat", **PROMPT)[0].token_ids


@pytest.fixture
def places(tmp_path):
    """A folder with a base, an ARM with another tokenizer, and an adapter of the base, each in a subfolder."""
    for name, seed in (("base", 0), ("arm", 1)):
        put(tmp_path / name / "x", seed)
    save_adapter(tmp_path / "lora" / "x", base=tmp_path / "base" / "x", seed=2, prompt_template="say {prompt}")
    return tmp_path


@pytest.mark.parametrize("arm", ["arm", "lora"])
def test_what_transformers_reads_there(places, arm):
    model = GenARM.from_pretrained(places / "base", places / arm, subfolder="x")
    base, other = (AutoModelForCausalLM.from_pretrained(places / "base", subfolder="x") for _ in range(2))
    template = "say {}" if arm == "lora" else "{}"
    beside = "base" if arm == "lora" else "arm"
    if arm == "lora":
        other = PeftModel.from_pretrained(other, places / "lora", subfolder="x")
    else:
        other = AutoModelForCausalLM.from_pretrained(places / "arm", subfolder="x")
    first, second = (AutoTokenizer.from_pretrained(places / name, subfolder="x") for name in ("base", beside))
    prompts = [first("the cat").input_ids, second(template.format("the cat")).input_ids]
    expected = reference.generate(base, [other], prompts, [1.0], max_new_tokens=8, seed=1)
    assert tokens(model) == expected.tokens
    assert model.arm_names == [arm]
    # The adapter runs over the base's weights.
    assert (model.members[1].shared is model.members[0].shared) == (arm == "lora")


def test_members_that_have_no_such_folder(places):
    """An ARM without the subfolder is loaded from its folder; a base has to have it."""
    flat = put(places / "flat", 3)
    expected = tokens(GenARM.from_pretrained(places / "base" / "x", flat))
    assert tokens(GenARM.from_pretrained(places / "base", flat, subfolder="x")) == expected
    given = AutoModelForCausalLM.from_pretrained(flat)
    model = GenARM.from_pretrained(given, places / "arm", subfolder="x")
    assert tokens(model) == tokens(GenARM.from_pretrained(flat, places / "arm" / "x"))
    with pytest.raises(FileNotFoundError, match=re.escape(f"base='{flat}': subfolder='x': expected it to be there")):
        GenARM.from_pretrained(flat, places / "arm", subfolder="x")
    with pytest.raises(TypeError, match="subfolder=1: expected the name of a folder"):
        GenARM.from_pretrained(flat, subfolder=1)


def test_a_tokenizer_beside_the_subfolder(tmp_path):
    build_model("llama", 0).save_pretrained(tmp_path / "base" / "a" / "b")
    build_tokenizer(add_bos=True).save_pretrained(tmp_path / "base")
    model = GenARM.from_pretrained(tmp_path / "base", subfolder="a/b")
    assert model.tokenizer("the").input_ids == build_tokenizer(add_bos=True)("the").input_ids


def test_drafts(places):
    model = GenARM.from_pretrained(places / "base", draft_model=places / "arm", subfolder="x")
    assert model.draft_model is not None
    assert torch.equal(model.draft_model.model.lm_head.weight, build_model("llama", 1).lm_head.weight)


def test_files_there_are_checked(places):
    weights = places / "base" / "x" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=re.escape(f"base: {weights}: expected a whole safetensors file")):
        GenARM.from_pretrained(places / "base", subfolder="x")


def test_an_adapter_without_a_fingerprint_shares_the_weights(places):
    """Its config may name the folder or the subfolder."""
    (places / "lora" / "x" / "genarm.json").unlink()
    for base in (places / "base", places / "base" / "x"):
        config = places / "lora" / "x" / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}))
        with pytest.warns(UserWarning, match="no fingerprint"):
            model = GenARM.from_pretrained(places / "base", places / "lora", subfolder="x")
        assert model.members[1].shared is model.members[0].shared


def test_kept_models_look_at_the_base_of_an_adapter_there(places):
    put(places / "other" / "x", 4)
    options = {"model_kwargs": {"subfolder": "x"}}

    def kept():
        return functional.kept_model(places / "other", functional.as_arms(places / "lora"), options)

    first = kept()
    assert kept() is first
    config = places / "base" / "x" / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": 5}))
    assert kept() is not first


@pytest.mark.parametrize("subfolder", ["", "x"])
def test_a_repository_is_read_as_it_was_asked_for(places, monkeypatch, subfolder):
    """The hub answers, and all files are in the caller's cache under a revision's name."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(places / "empty"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("genarm_fast.models.hub.get_hf_file_metadata", lambda url, token: asked.append(url))
    asked: list[str] = []
    for name in ("base", "arm", "lora"):
        repository = places / "cache" / f"models--someone--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "v2").write_text(COMMIT)
        (repository / "snapshots").mkdir()
        inside = places / name / "x"
        (inside if not subfolder else places / name).rename(repository / "snapshots" / COMMIT)
    options = {"revision": "v2", "cache_dir": str(places / "cache")} | ({"subfolder": subfolder} if subfolder else {})
    model = GenARM.from_pretrained("someone/base", ["someone/arm", "someone/lora"], **options)
    assert model.members[2].prompt_template == "say {prompt}"
    assert model.members[2].shared is model.members[0].shared
    assert model.members[1].tokenizer("the").input_ids[0] == 0 != model.tokenizer("the").input_ids[0]
    assert torch.equal(model.members[1].model.lm_head.weight, build_model("llama", 1).lm_head.weight)
    assert asked
    assert all("/v2/" in url for url in asked)
