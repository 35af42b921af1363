"""Verdicts of the self-check are remembered on disk, for the same code and shapes only."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_selfcheck import member, positions_by_count
from tiny_models import build_model
from transformers.models.llama import modeling_llama

from genarm_fast import GenARM
from genarm_fast.engine import selfcheck, verdict_key
from genarm_fast.models.weights import share_weights
from genarm_fast.utils import records


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of the records, in an empty cache."""
    monkeypatch.setenv("GENARM_FAST_SELFCHECK", "once")
    monkeypatch.setenv("GENARM_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "selfcheck"


@pytest.fixture
def checks(monkeypatch):
    """The comparisons made so far."""
    made, deviations = [], selfcheck.deviations
    monkeypatch.setattr(selfcheck, "deviations", lambda *args: made.append(args) or deviations(*args))
    return made


def key(model, tokenizer):
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    return verdict_key.verdict_key([member(inside, tokenizer)])


def adapted(base=None, r=4, target="q_proj", alpha=8):
    config = LoraConfig(r=r, target_modules=[target], lora_alpha=alpha, init_lora_weights=False)
    return get_peft_model(base or build_model("llama", 0), config).eval()


def test_a_record_spares_the_next_engine_the_check(tokenizer, folder, checks):
    """The record also serves other weights, and holds what the check would find."""
    found = []
    for seed in (0, 1):
        one = member(build_model("llama", seed), tokenizer)
        found.append(selfcheck.entries_of([one]))
        assert selfcheck.entries_of([one]) is found[-1]
    assert len(checks) == len(list(folder.glob("*.json"))) == 1
    assert found[0] == found[1]
    given = GenARM.from_pretrained(build_model("llama", 2), tokenizer=tokenizer)
    plain = given.generate([5, 6], max_new_tokens=4, seed=1)[0].token_ids
    assert len(checks) == 1
    assert (
        plain
        == GenARM.from_pretrained(given.base.model, tokenizer=tokenizer)
        .generate([5, 6], max_new_tokens=4, seed=1)[0]
        .token_ids
    )


def test_lanes_have_a_record_of_their_own(tokenizer, folder, checks):
    for _ in range(2):
        base = build_model("llama", 0)
        model = GenARM.from_pretrained(base, [adapted(share_weights(base))], tokenizer=tokenizer)
        assert model.base.shared is model.arms[0].shared
        for weights in (0.0, 1.0):
            model.generate([5, 6], max_new_tokens=2, weights=weights)
    assert len(checks) == len(list(folder.glob("*.json"))) == 1
    assert selfcheck.entries_of([member(base, tokenizer)])
    assert len(checks) == 2
    other = GenARM.from_pretrained(base, [adapted(share_weights(base), r=2)], tokenizer=tokenizer)
    assert selfcheck.entries_of(other.members)
    assert len(checks) == 3


CHANGES = {
    "width": lambda: build_model("llama", 0, vocab_size=301),
    "layers": lambda: build_model("llama", 0, num_hidden_layers=1),
    "config": lambda: build_model("llama", 0, rms_norm_eps=1e-3),
    "family": lambda: build_model("qwen2", 0),
    "dtype": lambda: build_model("llama", 0).to(torch.bfloat16),
    "adapter": adapted,
    "rank": lambda: adapted(r=2),
    "targets": lambda: adapted(target="v_proj"),
    "scaling": lambda: adapted(alpha=16),
}


def test_what_the_model_is_made_of_is_in_the_key(tokenizer):
    """Weights and folder are not part of the key."""
    keys = {name: key(make(), tokenizer) for name, make in CHANGES.items()}
    plain = key(build_model("llama", 0), tokenizer)
    assert len({plain, *keys.values()}) == 1 + len(keys)
    other = build_model("llama", 7)
    other.config._name_or_path = "elsewhere"
    assert key(other.train(), tokenizer) == plain
    other.config._attn_implementation = "eager"
    assert key(other, tokenizer) not in (plain, *keys.values())
    other = build_model("llama", 0)
    other.model.layers[0].self_attn.num_key_value_groups += 1
    assert key(other, tokenizer) != plain
    other = build_model("llama", 0)
    other.config.sliding_window = 5
    assert key(other, tokenizer) != plain


def patch_method(monkeypatch):
    forward = modeling_llama.LlamaAttention.forward
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", lambda self, *args, **kw: forward(self, *args, **kw))


def patch_helper(monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, unsqueeze_dim=1: (q, k))


def patch_attention(monkeypatch):
    monkeypatch.setitem(verdict_key.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *args, **kw: None)


def new_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9")


def new_package(monkeypatch):
    monkeypatch.setattr(verdict_key, "version", lambda package: f"{package} 9.9")


def new_source(monkeypatch):
    monkeypatch.setattr(verdict_key, "SOURCES", verdict_key.SOURCES[1:])


def new_kernels(monkeypatch):
    monkeypatch.setattr(verdict_key.kernels, "__file__", __file__)


def without_core(monkeypatch):
    monkeypatch.setattr(verdict_key.kernels._native, "core", None)


def new_processor(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9")


OTHERS = [
    *(patch_method, patch_helper, patch_attention, new_torch, new_package, new_source, new_kernels, without_core),
    new_processor,
]


@pytest.mark.parametrize("change", OTHERS)
def test_what_it_runs_on_is_in_the_key(tokenizer, monkeypatch, change):
    model = build_model("llama", 0)
    before = key(model, tokenizer)
    with monkeypatch.context() as patch:
        change(patch)
        verdict_key._library.cache_clear()
        assert key(model, tokenizer) != before
    verdict_key._library.cache_clear()
    assert key(model, tokenizer) == before


def hooked(model):
    model.model.layers[0].register_forward_pre_hook(lambda module, args: None)


def own_forward(model):
    model.model.norm.forward = types.MethodType(type(model.model.norm).forward, model.model.norm)


def typed_in(model):
    names = {"Base": type(model.model.norm), "__name__": "somewhere"}
    exec("class Norm(Base): pass", names)
    model.model.norm.__class__ = names["Norm"]


def undescribed(model):
    def refuse():
        raise TypeError("no JSON")

    model.config.to_dict = refuse


@pytest.mark.parametrize("change", [hooked, own_forward, typed_in, undescribed])
def test_code_that_is_not_known_is_checked_each_time(tokenizer, folder, checks, change):
    for count in (1, 2):
        model = build_model("llama", 0)
        change(model)
        selfcheck.entries_of([member(model, tokenizer)])
        assert len(checks) == count
    assert not folder.exists()


def test_a_model_that_fails_is_not_recorded(tokenizer, folder, checks, monkeypatch):
    """A failed model leaves no record, and a model like it is checked again."""

    class Shifted(modeling_llama.LlamaRMSNorm):
        def forward(self, x):  # wrong by the number of tokens in a forward
            return super().forward(x) + x.shape[1]

    for count in (selfcheck.TRIES, 2 * selfcheck.TRIES):
        model = build_model("llama", 0)
        model.model.norm.__class__ = Shifted
        with pytest.raises(ValueError, match="does not give the same logits"):
            selfcheck.entries_of([member(model, tokenizer)])
        assert len(checks) == count
    with pytest.raises(ValueError, match="does not give the same logits"):
        selfcheck.entries_of([member(positions_by_count(monkeypatch), tokenizer)])
    assert not folder.exists()


def written(folder) -> Path:
    (path,) = folder.glob("*.json")
    return path


def replaced(**changes):
    return lambda text: json.dumps(json.loads(text) | changes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-5],
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: text + " " * records.MAX_RECORD_BYTES,
        replaced(key="0" * 64),
        replaced(layers=[]),
        replaced(layers=5),
        replaced(layers=[[2, 8, 8, "float32"]]),
        replaced(layers=[[2, 8, 8, "float32"], 5]),
        replaced(layers=[[2, 8, 8, "float32"], [2, 8, 8]]),
        replaced(layers=[[2, 8, 8, "float32"], [2, 8, 8, "nn"]]),
        replaced(layers=[[2, 8, 8, "float32"], [2, 8, -8, "float32"]]),
        replaced(layers=[[2, 8, 8, "float32"], [2, 8, 1 << 40, "float32"]]),
        replaced(layers=[[2, 8, 8, "float32"], [2, 8, 8.5, "float32"]]),
    ],
)
def test_damaged_records_are_ignored(tokenizer, folder, checks, damage):
    """A damaged record is replaced by a whole one."""
    expected = selfcheck.entries_of([member(build_model("llama", 0), tokenizer)])
    path = written(folder)
    whole = path.read_text()
    path.write_text(damage(whole))
    assert selfcheck.entries_of([member(build_model("llama", 0), tokenizer)]) == expected
    assert len(checks) == 2
    assert path.read_text() == whole
    assert [each.name for each in folder.iterdir()] == [path.name]


def test_without_a_folder_that_can_be_written_to(tokenizer, tmp_path, folder, checks, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GENARM_FAST_CACHE", str(tmp_path / "file" / "cache"))
    for count in (1, 2):
        assert selfcheck.entries_of([member(build_model("llama", 0), tokenizer)])
        assert len(checks) == count
    monkeypatch.setenv("GENARM_FAST_CACHE", str(tmp_path / "cache"))
    selfcheck.entries_of([member(build_model("llama", 0), tokenizer)])
    path = written(folder)
    path.unlink()
    path.mkdir()  # a folder in place of the record prevents writing too
    assert selfcheck.entries_of([member(build_model("llama", 0), tokenizer)])
    assert [each.name for each in folder.iterdir()] == [path.name]


def test_settings(tokenizer, folder, checks, monkeypatch):
    monkeypatch.setenv("GENARM_FAST_SELFCHECK", "never")
    found = selfcheck.entries_of([member(build_model("llama", 0), tokenizer)])
    assert not checks
    assert not folder.exists()
    monkeypatch.setenv("GENARM_FAST_SELFCHECK", "always")
    for count in (1, 2):
        assert selfcheck.entries_of([member(build_model("llama", 0), tokenizer)]) == found
        assert len(checks) == count
    assert not folder.exists()
    monkeypatch.delenv("GENARM_FAST_SELFCHECK")
    for _ in range(2):
        assert selfcheck.entries_of([member(build_model("llama", 0), tokenizer)]) == found
    assert len(checks) == 3
    monkeypatch.setenv("GENARM_FAST_SELFCHECK", "off")
    expected = "GENARM_FAST_SELFCHECK='off': expected one of once, always, never"
    with pytest.raises(ValueError, match=expected):
        GenARM.from_pretrained("/no/folder", tokenizer=tokenizer)


def test_two_processes_write_one_record(folder):
    """Each process reads a whole record at any time, its own or the other's."""
    code = """
import sys
from genarm_fast.utils.records import read_record, write_record
own = sys.argv[1]
for i in range(300):
    write_record("selfcheck", "k", {"by": own, "layers": [own] * (1 + 97 * i % 4001)})
    found = read_record("selfcheck", "k")
    assert found is not None and set(found["layers"]) == {found["by"]}, found
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert [path.name for path in folder.iterdir()] == ["k.json"]
