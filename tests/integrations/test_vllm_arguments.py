"""The arguments that vLLM gets for base and ARMs, and what is refused before it starts. vLLM is not needed here."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from jinja2 import TemplateError
from peft import LoraConfig
from tiny_models import build_model, build_tokenizer, save_adapter
from transformers import AutoModelForCausalLM

from genarm_fast import ARM
from genarm_fast.cli.serve import template_of
from genarm_fast.integrations.vllm import engine_args
from genarm_fast.integrations.vllm.adapters import lora_tensors
from genarm_fast.integrations.vllm.arguments import served_arguments
from genarm_fast.integrations.vllm.prompts import member_tokenizers, pinned_template, shared_tokens
from genarm_fast.integrations.vllm.served import Served, ServedARM, check_version
from genarm_fast.models.adapter import INITS_KEEPING_BASE, REPEATED_INITS
from genarm_fast.models.checkpoint_fingerprint import checkpoint_fingerprint
from genarm_fast.models.fingerprint import fingerprint

DOCS = Path(__file__).parents[2] / "docs" / "vllm.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a base, an ARM, an adapter of the base, and a base of the same shape with other weights."""
    folder = tmp_path_factory.mktemp("members")
    for name, seed in (("base", 0), ("small", 1), ("other", 2)):
        build_model("llama", seed).save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    save_adapter(folder / "lora", base=folder / "base", seed=0)
    return folder


def test_a_model_of_its_own_runs_beside_and_an_adapter_is_a_lane(folder):
    arms = [ARM(folder / "small", name="kind", weight=0.5), folder / "lora"]
    args = engine_args(folder / "base", arms, dtype="float32", hf_overrides={"rope_theta": 5.0}, weight_range=(-1, 2))
    overrides = args.pop("hf_overrides")
    assert args == {"model": str(folder / "base"), "dtype": "float32"}
    assert overrides["architectures"] == ["GenARMForCausalLM"]
    assert overrides["rope_theta"] == 5.0
    served = Served.of(json.loads(json.dumps(overrides)))
    assert served.arms == (
        ServedARM("kind", str(folder / "small"), 0.5),
        ServedARM("lora", str(folder / "lora"), 1.0, lane=True),
    )
    assert served.weight_range == (-1.0, 2.0)
    assert "vllm" not in sys.modules


def test_the_example_of_the_docs(folder, monkeypatch, capsys):
    """The example runs unchanged, with a stand-in for vLLM; tests/vllm_plugin runs the real one."""
    (example,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    save_adapter(folder / "lora0", base=folder / "base", seed=0)
    made: list[dict] = []

    class LLM:
        def __init__(self, **settings):
            made.append(settings)

        def generate(self, prompts, params):
            return [SimpleNamespace(outputs=[SimpleNamespace(text=f"{prompts[0]} {params['extra_args']}")])]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=dict))
    monkeypatch.chdir(folder)
    exec(example, {"__name__": "__main__"})
    assert Served.of(made[0]["hf_overrides"]).names == ["kind", "terse"]
    assert [arm["lane"] for arm in made[0]["hf_overrides"]["genarm_arms"]] == [False, True]
    assert capsys.readouterr().out == "the cat sat on {'arm_weights.kind': 1.0}\n"


@pytest.mark.parametrize("tied", [False, True])
def test_the_fingerprint_of_files_is_that_of_the_loaded_model(tied, tmp_path):
    build_model("llama", 3, tie_word_embeddings=tied).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert checkpoint_fingerprint(tmp_path) == fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", ["model.fp16.safetensors", "consolidated.safetensors", "aaa.safetensors"])
def test_files_that_nobody_loads_have_no_part_in_it(sharded, name, tmp_path):
    """Variants and other formats repeat the tensors' names; only the files that transformers loads count."""
    build_model("llama", 3).save_pretrained(tmp_path, max_shard_size="50KB" if sharded else "5GB")
    build_model("llama", 4).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / name)
    assert checkpoint_fingerprint(tmp_path) == fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path))


def test_an_adapter_of_other_weights_is_refused(folder):
    with pytest.raises(ValueError, match=r"lora' is an adapter of .*expected one of the base"):
        engine_args(folder / "other", folder / "lora")


def test_without_a_fingerprint_the_recorded_base_decides(folder, tmp_path):
    save_adapter(tmp_path / "lora", base=folder / "base", seed=0)
    (tmp_path / "lora" / "genarm.json").unlink()
    with pytest.warns(UserWarning, match="no fingerprint"):
        engine_args(folder / "base", tmp_path / "lora")
    with pytest.raises(ValueError, match="expected one of the base"):
        engine_args(folder / "other", tmp_path / "lora")


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"rank_pattern": {"q_proj": 2}}, "rank_pattern")],
)
def test_more_than_plain_lora_is_refused(settings, named, folder, tmp_path):
    save_adapter(tmp_path, base=folder / "base", seed=0, config=LoraConfig(r=4, target_modules=["q_proj"], **settings))
    with pytest.raises(ValueError, match=f"{named}=.*expected plain LoRA"):
        engine_args(folder / "base", tmp_path)


@pytest.mark.filterwarnings("ignore:.*eva_config")
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        *(({"init_lora_weights": how}, None) for how in INITS_KEEPING_BASE),
        *(
            ({"init_lora_weights": how, "loftq_config": {"loftq_bits": 4}}, f"init_lora_weights='{how}': it rewrites")
            for how in REPEATED_INITS
        ),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda': expected one of"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens=.*expected a LoRA without it"),
        ({"use_future_idea": True}, "use_future_idea=True: expected no such setting"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan: expected a finite number"),
        ({"use_rslora": "false"}, "use_rslora='false': expected true or false"),
    ],
    ids=str,
)
def test_settings_of_adapters_are_read_as_everywhere(setting, said, folder, tmp_path):
    """The lists of genarm_fast.models.adapter decide: an adapter setting that is unknown there is refused here too."""
    save_adapter(tmp_path, base=folder / "base", seed=0)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    if said is None:
        (arm,) = engine_args(folder / "base", tmp_path)["hf_overrides"]["genarm_arms"]
        assert arm["lane"]
        return
    with pytest.raises(ValueError, match=said):
        engine_args(folder / "base", tmp_path)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 1.5), (True, 3.0)])
def test_the_scale_of_a_lane(rslora, scale, folder, tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], use_rslora=rslora)
    save_adapter(tmp_path, base=folder / "base", seed=0, config=config)
    tensors, found = lora_tensors(str(tmp_path))
    assert (found, len(tensors)) == (scale, 4)  # A and B of two layers


def test_what_is_refused_names_the_argument(folder, tmp_path):
    base, arm = folder / "base", folder / "small"
    cases = [
        (TypeError, "arms\\[0\\]=LlamaForCausalLM", {"arms": build_model("llama", 0)}),
        (TypeError, "base=LlamaForCausalLM", {"base": build_model("llama", 0)}),
        (ValueError, "arms=\\[\\]", {"arms": []}),
        (TypeError, "model='x'", {"model": "x"}),
        (TypeError, "hf_overrides=", {"hf_overrides": len}),
        (ValueError, "genarm_arms", {"hf_overrides": {"genarm_arms": []}}),
        (ValueError, "prompt_template='<\\{prompt\\}>'", {"arms": ARM(arm, prompt_template="<{prompt}>")}),
        (ValueError, "weight_range=\\(2, 1\\)", {"weight_range": (2, 1)}),
        (TypeError, "weight_range=3", {"weight_range": 3}),
        (ValueError, "name='a'", {"arms": [ARM(arm, name="a"), ARM(arm, name="a")]}),
    ]
    for kind, message, changed in cases:
        with pytest.raises(kind, match=message):
            engine_args(**({"base": base, "arms": arm} | changed))


@pytest.mark.parametrize(
    ("version", "fits"), [("0.31.2", False), ("0.32.0", True), ("0.33.1", True), ("0.34.0", False)]
)
def test_versions_of_vllm(version, fits):
    if fits:
        check_version(version)
    else:
        with pytest.raises(RuntimeError, match=f"vLLM {version}: expected at least 0.32 and below 0.34"):
            check_version(version)


def served_arm(folder: Path, **recorded: object) -> ServedARM:
    (folder / "genarm.json").write_text(json.dumps(recorded))
    return ServedARM("kind", str(folder))


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({"prompt_template": "### {prompt}"}, "prompt_template='### {prompt}'"),
        ({"chat_template": "{{ messages }}"}, "chat template of its own"),
        ({"prompt_format": "transcript"}, "trained on transcripts"),
    ],
)
def test_an_arm_that_reads_other_prompts_is_refused(recorded, message, tmp_path):
    with pytest.raises(ValueError, match=f"kind: .*{message}"):
        member_tokenizers(build_tokenizer(), [served_arm(tmp_path, **recorded)])


def test_tokenizers_are_compared(tmp_path):
    base = build_tokenizer()
    same = member_tokenizers(base, [served_arm(tmp_path, prompt_template=None, chat_template=base.chat_template)])
    assert same == [base, base]  # the ARM's folder has no tokenizer
    build_tokenizer(add_bos=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="kind: its tokenizer reads"):
        member_tokenizers(base, [served_arm(tmp_path)])
    other = build_tokenizer()
    other.chat_template = "{{ messages }}"
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another chat template"):
        member_tokenizers(base, [served_arm(tmp_path)])


def test_shared_tokens_are_the_narrowest_and_must_agree():
    base, other = build_tokenizer(), build_tokenizer()
    assert shared_tokens([base, other], [384, 310], ["base", "kind"]) == 300
    assert shared_tokens([base, other], [384, 290], ["base", "kind"]) == 290
    other.add_tokens(["<new>"])
    base.add_tokens(["<old>"])
    with pytest.raises(ValueError, match="kind: its tokenizer disagrees with the base's at token id 300"):
        shared_tokens([base, other], [384, 384], ["base", "kind"])


def test_only_the_integration_and_serve_import_vllm():
    package = DOCS.parents[1] / "genarm_fast"
    sources = {path.relative_to(package).as_posix(): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    importing = {name for name, text in sources.items() if re.search(r"^\s*(?:import|from) vllm\b", text, re.MULTILINE)}
    others = {name for name in importing if not name.startswith("integrations/vllm/")}
    assert others == {"cli/serve.py"}
    # Imported only inside a function.
    assert not re.search(r"^(?:import|from) vllm\b", sources["cli/serve.py"], re.MULTILINE)
    assert "integrations/vllm/composite.py" in importing


def record(folder, arm, **arguments):
    """Return a copy of an ARM's folder, with a record as its training would write it."""
    place = folder.parent / arm
    shutil.copytree(folder, place, dirs_exist_ok=True)
    (place / "genarm.json").write_text(json.dumps({"chat_template_kwargs": arguments}))
    return place


def rendered(template, **arguments):
    tokenizer = build_tokenizer()
    messages = [{"role": "user", "content": "hi"}]
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **arguments)


@pytest.mark.parametrize("value", [False, True, None, 3, 0.5, 'it\'s "so"\n{{ ä 😀 }}', [1, None], {"a": [True]}])
def test_what_arms_were_trained_with_is_in_the_template(value):
    """A request may name the same value or none; another value is refused. Arguments of other names pass unchanged."""
    template = pinned_template("{{ thinking | tojson }} {{ other }}", {"thinking": value})
    expected = rendered("{{ thinking | tojson }} {{ other }}", thinking=value, other=1)
    assert rendered(template, other=1) == rendered(template, thinking=value, other=1) == expected
    with pytest.raises(TemplateError, match=r"thinking: expected .*, with which the ARMs were trained"):
        rendered(template, thinking="another")


def test_a_server_gives_what_arms_were_trained_with(folder):
    kind, terse = (record(folder / "small", name, thinking=False) for name in ("kind", "terse"))
    other = record(folder / "small", "contrary", thinking=True, tone="dry")
    args = SimpleNamespace(model=str(folder / "base"), tokenizer=None, tokenizer_revision=None, trust_remote_code=False)
    args.chat_template = None
    served, _ = served_arguments(folder / "base", [kind, terse, folder / "small"])
    template = template_of(served.arms, args)
    assert rendered(template) == rendered(build_tokenizer().chat_template)
    with pytest.raises(TemplateError, match="thinking: expected False"):
        rendered(template, thinking=True)
    assert template_of(served_arguments(folder / "base", folder / "small")[0].arms, args) is None
    with pytest.warns(UserWarning, match=r"chat_template_kwargs=\{'thinking': False\}: give `LLM.chat` the same"):
        engine_args(folder / "base", kind)
    with pytest.raises(ValueError, match=r"contrary: it was trained with thinking=True .*, kind with False"):
        engine_args(folder / "base", [kind, other])
    args.chat_template = "mine.jinja"
    with pytest.raises(ValueError, match="--chat-template: expected none"):
        template_of(served.arms, args)


@pytest.mark.parametrize("arguments", ["text", {"a %}{{ 1 }}{% set b": 1}, {"messages": []}])
def test_a_record_that_training_never_writes(folder, arguments):
    place = record(folder / "small", "odd")
    (place / "genarm.json").write_text(json.dumps({"chat_template_kwargs": arguments}))
    with pytest.raises(ValueError, match="odd: chat_template_kwargs"):
        engine_args(folder / "base", place)
