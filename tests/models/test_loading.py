"""A folder is whole or refused, none of its code runs, and a given model stays as it was."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import build_model, build_tokenizer, edit
from transformers import AutoModelForCausalLM

from genarm_fast import ARM, GenARM
from genarm_fast.cli import main
from genarm_fast.models.adapter import check_kind
from genarm_fast.models.files import check_sizes
from genarm_fast.train import TrainConfig, train

ROOT = Path(__file__).parents[2]
TARGETS = ["q_proj", "down_proj"]


def lose(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def train_on(base, tmp_path):
    """Train on one pair."""
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    options = {"data": str(tmp_path / "d.jsonl"), "output": str(tmp_path / "out"), "holdout_fraction": 0.0}
    train(TrainConfig(base=str(base), **options), progress=False)


UP = "model.layers.1.mlp.up_proj.weight"
FAULTS = [
    (lose(UP), f"lacks {UP}"),
    (lose("lm_head.weight"), "lacks lm_head.weight"),
    (put("score.weight", 1, 32), "has no place for score.weight"),
    (put(UP, 3, 3), f"has other shapes for {UP}"),
]


@pytest.mark.parametrize(("change", "said"), FAULTS)
@pytest.mark.parametrize("role", ["base", "arms[0]", "draft_model", "training"])
def test_a_checkpoint_is_whole_or_refused(base, tmp_path, role, change, said):
    build_model("llama", 1).save_pretrained(tmp_path / "cut")
    build_tokenizer().save_pretrained(tmp_path / "cut")
    edit(tmp_path / "cut" / "model.safetensors", change)
    cut = tmp_path / "cut"
    loads = {
        "base": lambda: GenARM.from_pretrained(cut),
        "arms[0]": lambda: GenARM.from_pretrained(base, cut),
        "draft_model": lambda: GenARM.from_pretrained(base, draft_model=cut),
        "training": lambda: train_on(cut, tmp_path),
    }
    name = "base" if role == "training" else role
    with pytest.raises(ValueError, match=re.escape(f"{name}='{cut}'") + f".*{said}"):
        loads[role]()


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ADAPTER_FAULTS = [
    (lose(A), "lacks .*layers.0.self_attn.q_proj.lora_A"),
    (put(A.replace("q_proj", "v_proj"), 4, 32), "has no place for .*v_proj"),
    (put(A, 4, 5), "adapter that PEFT can put on its base.*size mismatch"),
    (put(A.replace(".layers.", ".language_model.layers."), 4, 32), "has no place for .*language_model"),
    (put("base_model.model.lm_head.weight", 302, 32), "302 rows, the base 300: .*added tokens"),
]


@pytest.mark.parametrize(("change", "said"), ADAPTER_FAULTS)
def test_an_adapter_is_whole_or_refused(base, adapter, change, said):
    edit(adapter / "adapter_model.safetensors", change)
    with pytest.raises(ValueError, match=rf"arms\[0\]='.*adapter': .*{said}"):
        GenARM.from_pretrained(base, adapter)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS': expected an adapter of a causal LM"),
        ({"peft_type": "LORB"}, "peft_type='LORB': expected one that PEFT knows: "),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"megatron_config": {"x": 1}, "megatron_core": "antigravity"}, "megatron_"),
        ({"use_future_idea": True}, "use_future_idea=True: expected no such setting"),
    ],
)
def test_adapters_of_other_kinds_are_refused(base, adapter, setting, said):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(ValueError, match=rf"arms\[0\]='.*adapter': .*{said}"):
        GenARM.from_pretrained(base, adapter)


def test_kinds_that_train_only_lora_fields_pass():
    check_kind("arm", LoraConfig(r=3, use_dora=True, rank_pattern={"q_proj": 2}, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="add virtual tokens"):
        check_kind("arm", PromptTuningConfig(num_virtual_tokens=3))


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_initialisations_that_rewrite_the_base_spare_a_given_one(base, tmp_path, init):
    given = AutoModelForCausalLM.from_pretrained(base)
    before = copy.deepcopy(given.state_dict())
    adapted = get_peft_model(copy.deepcopy(given), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init))
    adapted.save_pretrained(tmp_path / "arm")
    expected = PeftModel.from_pretrained(copy.deepcopy(given), tmp_path / "arm").eval()
    with pytest.warns(UserWarning, match="no fingerprint"):
        model = GenARM.from_pretrained(given, tmp_path / "arm", tokenizer=build_tokenizer())
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.allclose(model.arms[0].model(tokens).logits, expected(tokens).logits, atol=1e-4)


def test_one_adapted_model_in_two_roles(tokenizer):
    base = build_model("llama", 0)
    adapted = get_peft_model(build_model("llama", 0), LoraConfig(r=2, target_modules=TARGETS))
    with pytest.raises(ValueError, match=r"arms\[1\]: the same adapted model as arms\[0\]"):
        GenARM.from_pretrained(base, [adapted, adapted], tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"base: PEFT has put an adapter into this model"):
        GenARM.from_pretrained(adapted.get_base_model(), adapted, tokenizer=tokenizer)
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    arm = ARM(adapted)
    adapted.set_adapter("other")
    with pytest.raises(
        ValueError, match=r"arms\[0\]: its active adapter was default when the ARM was made and is other"
    ):
        GenARM.from_pretrained(base, arm, tokenizer=tokenizer)


def write(text):
    return lambda path: path.write_text(text)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (write("[1]"), "expected a JSON object in UTF-8 without a byte order mark, got list"),
        (write("{"), "expected a JSON object .*Expecting property name"),
        (write("[" * 200000), "expected a JSON object"),
        (write('{"a": "' + "x" * (17 << 20) + '"}'), "expected a JSON object of at most 16777216 bytes"),
        (lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()), "without a byte order mark"),
        (pipe, "expected a file, got a pipe"),
        (folder, "expected a file, got a folder"),
        (dangling, "expected a file, got a link to nothing"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "genarm.json"])
def test_files_that_are_no_files(base, adapter, name, damage, said):
    place = base if name == "config.json" else adapter
    damage(place / name)
    with pytest.raises(ValueError, match=f"{re.escape(str(place / name))}: .*{said}"):
        GenARM.from_pretrained(base, adapter)


def loop(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def device(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def new_pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def new_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


OBJECTS = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"]
OBJECTS += ["special_tokens_map.json", "added_tokens.json"]
TEXTS = [*OBJECTS, "chat_template.jinja"]
OTHERS = ["model.safetensors", "other.safetensors", "vocab.txt", "pytorch_model.bin"]  # these names are checked too
DAMAGES = [
    *((name, each, "expected a file, got") for name in TEXTS + OTHERS for each in (new_pipe, new_folder, loop, device)),
    *((name, write(text), "expected") for name in OBJECTS for text in ("[1]", "{", "", "[" * 10**5)),
    *((name, write('{"a":' * 900 + "0" + "}" * 900), "expected") for name in OBJECTS),
    *((name, lambda path: path.write_bytes(b"\xef\xbb\xbf{}"), "expected .*mark") for name in TEXTS),
    *((name, lambda path: path.write_bytes(b'{"a": "\xff"}'), "expected .*UTF-8") for name in TEXTS),
    ("chat_template.jinja", write("x" * (2 << 20)), "expected a Jinja template of at most 1048576 bytes"),
    ("model.safetensors", lambda path: path.write_bytes(b"\xff" * 8 + b"{}"), "expected a whole safetensors file"),
    ("model.safetensors", write(""), "expected a whole safetensors file"),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGES)
def test_every_other_file_that_is_none(base, adapter, name, damage, said):
    """A pipe is refused before it is opened: a read would wait forever, in safetensors even through Ctrl-C."""
    damage(base / name)
    with pytest.raises(ValueError, match=f"(?s)base: {re.escape(str(base / name))}: .*{said}"):
        GenARM.from_pretrained(base, adapter)


ENDLESS = "([a-z0-9_.]+)+!"
HOSTILE_SETTINGS = [
    # transformers fetches kernels that a config names from the hub and runs their code.
    *(
        ("config.json", {name: value}, f"{name}=.*: expected none that brings code of its own")
        for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
        for value in ("someone/kernel", "paged|someone/kernel@main:flash", {"": "someone/kernel"})
    ),
    ("config.json", {"text_config": {"attn_implementation": "a/b"}}, "text_config: attn_implementation='a/b'"),
    ("config.json", {"experts_implementation": "a/b"}, "experts_implementation='a/b': expected none"),
    # These patterns take forever in `re`, which nothing can interrupt.
    ("adapter_config.json", {"target_modules": ENDLESS}, "target_modules=.*expected a pattern that ends within"),
    ("adapter_config.json", {"exclude_modules": ENDLESS}, "exclude_modules=.*expected a pattern that ends within"),
    ("adapter_config.json", {"rank_pattern": {ENDLESS: 4}}, "rank_pattern=.*expected a pattern that ends within"),
    ("adapter_config.json", {"alpha_pattern": {ENDLESS: 4}}, "alpha_pattern=.*expected a pattern that ends within"),
    (
        "adapter_config.json",
        {"layers_pattern": ENDLESS, "layers_to_transform": [0]},
        "layers_pattern=.*expected a pattern that ends within",
    ),
    ("adapter_config.json", {"lora_alpha": float("nan")}, "lora_alpha=nan: expected a finite number"),
    ("adapter_config.json", {"lora_alpha": float("inf")}, "lora_alpha=inf: expected a finite number"),
    ("adapter_config.json", {"lora_alpha": None}, "lora_alpha=None: expected a finite number"),
    ("adapter_config.json", {"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern\['q_proj'\]='x': expected a finite"),
    ("config.json", {"max_position_embeddings": 0}, "base: max_position_embeddings=0: expected at least 1"),
    ("config.json", {"max_position_embeddings": -1}, "base: max_position_embeddings=-1: expected at least 1"),
    ("generation_config.json", {"eos_token_id": "x"}, "base: eos_token_id='x' .*: expected token ids"),
    ("generation_config.json", {"eos_token_id": [1, "2"]}, "base: eos_token_id=.*: expected token ids"),
    ("generation_config.json", {"eos_token_id": True}, "base: eos_token_id=True .*: expected token ids"),
    ("genarm.json", {"end_token_id": -1}, "genarm.json: end_token_id=-1: expected what training records"),
    ("genarm.json", {"end_token_id": True}, "genarm.json: end_token_id=True: expected what training records"),
    ("genarm.json", {"end_token_id": 10**12}, "genarm.json: end_token_id=1000000000000: expected a token of the base"),
    ("genarm.json", {"chat_template_kwargs": [1]}, r"chat_template_kwargs=\[1\]: expected what training records"),
    ("genarm.json", {"chat_template_kwargs": {"messages": []}}, "genarm.json: .*chat_template_kwargs='messages'"),
    ("config.json", {"return_dict": False}, "base: return_dict=False in its config: expected true"),
    ("config.json", {"dtype": "floaty"}, "config.json: expected a config .*floaty"),
    ("model.safetensors.index.json", {"weight_map": {"a": "model.safetensors"}}, "expected an object 'metadata' in it"),
]


@pytest.mark.parametrize(("name", "changes", "said"), HOSTILE_SETTINGS)
def test_settings_that_nobody_means(base, adapter, monkeypatch, name, changes, said):
    monkeypatch.setattr("genarm_fast.models.patterns.LIMIT_SECONDS", 1.0)
    place = (adapter if name in ("adapter_config.json", "genarm.json") else base) / name
    old = json.loads(place.read_text()) if place.exists() else {}
    place.write_text(json.dumps(old | changes))
    with pytest.raises(ValueError, match=said):
        GenARM.from_pretrained(base, adapter)


def test_patterns_that_end_are_no_fault(base, adapter):
    """The patterns are those that Unsloth and PEFT's own documentation write."""
    whole = GenARM.from_pretrained(base, adapter).generate([5, 6], seed=1, max_new_tokens=4)[0].token_ids
    found = json.loads((adapter / "adapter_config.json").read_text())
    names = "|".join(found["target_modules"])
    for pattern in (
        rf".*\.({names})$",
        rf"(?:.*?(?:self_attn|mlp).*?(?:{names}).*?)|(?:\bmodel\.layers\.[\d]{{1,}}\.x)",
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(found | {"target_modules": pattern}))
        assert GenARM.from_pretrained(base, adapter).generate([5, 6], seed=1, max_new_tokens=4)[0].token_ids == whole


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.int64])
@pytest.mark.parametrize("which", ["base", "adapter"])
def test_weights_that_are_no_floating_point_numbers(base, adapter, which, dtype):
    """transformers would cast unquantised ones silently and drop the imaginary part."""
    path = base / "model.safetensors" if which == "base" else adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = min(name for name in tensors if "q_proj" in name)
    save_file(tensors | {name: tensors[name].to(dtype)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: {re.escape(name)} is \w+: expected floating-point"):
        GenARM.from_pretrained(base, adapter)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("config.json", {"num_hidden_layers": 10**9}, "expected at most"),
        ("config.json", {"num_hidden_layers": 20_000}, "num_hidden_layers=20000: expected at most 10000"),
        (
            "config.json",
            {"vocab_size": 80_000, "hidden_size": 80_000},
            "a model of [0-9]{11} numbers: expected at most",
        ),
        ("config.json", {"hidden_size": "x"}, "expected a config that a causal LM can be built from"),
        ("config.json", {"num_attention_heads": 0}, "expected a config that a causal LM can be built from"),
        ("config.json", {"model_type": "no such"}, "expected a config that a causal LM can be built from"),
        ("adapter_config.json", {"r": 10**9}, "rank 1000000000: expected at most 64"),
        ("adapter_config.json", {"rank_pattern": {"q_proj": 500}}, "rank 500: expected at most 64"),
    ],
)
def test_sizes_that_cannot_be_meant(base, adapter, monkeypatch, name, changes, said):
    """The sizes are refused before memory is allocated for them."""
    path = (base if name == "config.json" else adapter) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it is built"))
    if name != "config.json":
        monkeypatch.undo()
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{said}"):
        GenARM.from_pretrained(base, adapter)


def test_a_base_that_an_adapter_would_change_is_told(base, adapter, monkeypatch):
    """The base is fingerprinted before and after; in this test the weights that PEFT rewrites are shared by mistake."""
    edit(adapter / "adapter_model.safetensors", put("base_model.model.model.embed_tokens.weight", 300, 32))
    GenARM.from_pretrained(base, adapter)
    monkeypatch.setattr("genarm_fast.models.adapter._rewritten", lambda *_: set())
    with pytest.raises(RuntimeError, match="changed the weights of its base"):
        GenARM.from_pretrained(base, adapter)


def test_the_command_says_it_in_a_line(base, capsys):
    (base / "genarm.json").write_text("[")
    assert main(["generate", "--base", str(base), "hello"]) == 2
    assert re.fullmatch(
        r"genarm-fast generate: error: base: .*genarm\.json: expected a JSON .*\n", capsys.readouterr().err
    )


def test_other_files_that_are_damaged(base, adapter):
    whole = {path: path.read_bytes() for path in (*base.iterdir(), *adapter.iterdir())}
    config = json.loads(whole[base / "config.json"])
    for path, content, said in (
        (base / "model.safetensors", whole[base / "model.safetensors"][:-9], "expected a whole safetensors file"),
        (base / "tokenizer.json", b'{"model": 5}', r"base: .*tokenizer\.json: expected a tokenizer"),
        (adapter / "adapter_model.safetensors", b"x" * 40, "expected a whole safetensors file"),
        (adapter / "genarm.json", b'{"prompt_template": 5}', "genarm.json: prompt_template=5: expected what"),
        (base / "config.json", json.dumps(config | {"num_hidden_layers": 10**9}).encode(), "num_hidden_layers=10000"),
        (
            base / "model.safetensors.index.json",
            b'{"metadata": {}, "weight_map": {"a": "../b"}}',
            "expected the file '../b' beside it",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            GenARM.from_pretrained(base, adapter)
        path.unlink()
        for each, bytes in whole.items():
            each.write_bytes(bytes)
    GenARM.from_pretrained(base, adapter)


def test_sizes_within_settings():
    check_sizes("config", {"vocab_size": 10, "eos_token_id": 10**6, "text_config": {"hidden_size": 9}}, 100)
    with pytest.raises(ValueError, match="config: text_config: n_layer=101: expected at most 100"):
        check_sizes("config", {"text_config": {"n_layer": 101}}, 100)


CODE = (
    "open({mark!r}, 'w').write('ran')\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
    "class C(LlamaConfig):\n    model_type = 'own'\nclass M(LlamaForCausalLM):\n    config_class = C\n"
)


@pytest.fixture
def foreign(tmp_path, base, monkeypatch):
    """A model with its own code, which leaves a mark when it runs; every question on stdin is answered yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (base / "own.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (base / "config.json").write_text(json.dumps(config))
    return base


def test_code_of_a_folder_runs_only_when_asked_for(foreign, tmp_path, tokenizer):
    mark, bare = tmp_path / "ran", build_model("llama", 1)
    with pytest.raises(ValueError, match=r"base: .*trust_remote_code"):
        GenARM.from_pretrained(foreign)
    with pytest.raises(ValueError, match=r"arms\[0\]: .*trust_remote_code"):
        GenARM.from_pretrained(bare, foreign, tokenizer=tokenizer, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"base=.*trust_remote_code"):
        train_on(foreign, tmp_path)
    assert not mark.exists()
    GenARM.from_pretrained(bare, ARM(foreign, trust_remote_code=True), tokenizer=tokenizer)
    assert mark.exists()
    mark.unlink()
    GenARM.from_pretrained(foreign, trust_remote_code=True, device="cpu")
    with pytest.raises(TypeError, match="trust_remote_code='yes': expected True or False"):
        GenARM.from_pretrained(foreign, trust_remote_code="yes")


def test_every_load_says_whose_code_may_run():
    """With None, transformers' default, a load asks on stdin."""
    files = subprocess.check_output(["git", "ls-files", "genarm_fast", "scripts", "benchmarks"], cwd=ROOT, text=True)
    call = re.compile(r"\b(?:Auto|Generation)\w+\.from_pretrained\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)")
    calls = [
        match[0] for name in files.split() if name.endswith(".py") for match in call.finditer((ROOT / name).read_text())
    ]
    assert len(calls) > 10
    assert [each for each in calls if "trust_remote_code=" not in each] == []
