"""Models of the hub without the hub: its cache is a folder of the test, and no host name resolves."""

from __future__ import annotations

import json
import shutil
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers
from tiny_models import build_model, build_tokenizer, save_adapter

from genarm_fast import GenARM

COMMIT = "0123456789" * 4
PROMPT = {"prompts": [5, 6, 7], "max_new_tokens": 10, "seed": 1, "ignore_eos": True}


@pytest.fixture
def tries(monkeypatch, tmp_path):
    """The hosts that were looked up. A wait for one fails the test."""
    hosts = []

    def resolve(host, *_, **__):
        hosts.append(host)
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    build_hf_headers()  # asks the hub once per process for known agent harnesses
    hosts.clear()
    return hosts


def put_in_cache(folder, cache, name):
    """Put the folder into the hub's cache as a download leaves it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def test_a_name_of_nothing_fails_at_once(monkeypatch, tmp_path, tries):
    """The name fails before the base is loaded."""
    (tmp_path / "base").mkdir()
    monkeypatch.setattr("genarm_fast.models.checkpoint.ModelLoader.load", lambda *_: pytest.fail("loads"))
    message = r"arms\[1\]='positve': .* neither a folder here nor in the hub's cache, and the hub can't be reached: "
    with pytest.raises(FileNotFoundError, match=message):
        GenARM.from_pretrained(tmp_path / "base", [tmp_path / "base", "positve"])
    assert len(tries) <= 1  # none with HF_HUB_OFFLINE=1


def test_models_in_the_cache(tmp_path, tries):
    """Each name takes at most one try. Files that a repository lacks cost none, nor does the adapter's own base."""
    build_model("llama", 0).save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "lora", base=tmp_path / "base", seed=1)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    shutil.copytree(tmp_path / "lora", tmp_path / "bare", ignore=shutil.ignore_patterns("genarm.json"))
    config["base_model_name_or_path"] = "someone/base"
    (tmp_path / "bare" / "adapter_config.json").write_text(json.dumps(config))
    for name in ("base", "lora", "bare"):
        put_in_cache(tmp_path / name, tmp_path / "cache", f"someone/{name}")
    expected = GenARM.from_pretrained(tmp_path / "base", tmp_path / "lora").generate(**PROMPT)[0].token_ids
    assert not tries

    model = GenARM.from_pretrained("someone/base", "someone/lora", dtype=torch.float32)
    assert model.arm_names == ["lora"]
    assert model.generate(**PROMPT)[0].token_ids == expected
    assert len(tries) <= 2
    with pytest.warns(UserWarning, match="no fingerprint"):
        model = GenARM.from_pretrained("someone/base", "someone/bare")
    assert model.generate(**PROMPT)[0].token_ids == expected
    assert len(tries) <= 4


def test_a_given_model_of_the_hub_without_its_tokenizer(tries):
    model = build_model("llama", 0)
    model.config._name_or_path = "someone/gone"
    with pytest.raises(ValueError, match="tokenizer=None: expected a tokenizer, since the base 'someone/gone' has no"):
        GenARM.from_pretrained(model)
    assert len(tries) <= 1


def test_what_the_hub_lacks(monkeypatch, tries):
    def refuse(url, token):
        raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("genarm_fast.models.hub.get_hf_file_metadata", refuse)
    with pytest.raises(FileNotFoundError, match=r"base='no/where': .* the hub has no such repository"):
        GenARM.from_pretrained("no/where")
    with pytest.raises(FileNotFoundError, match=r"draft_model='no/where': .* the hub has no such repository"):
        GenARM.from_pretrained(build_model("llama", 0), tokenizer=build_tokenizer(), draft_model="no/where")


def test_what_is_no_hub_id(tries):
    with pytest.raises(FileNotFoundError, match=r"base='a/b/c': .* is no hub id"):
        GenARM.from_pretrained("a/b/c")
    assert not tries
