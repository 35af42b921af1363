"""Loading members: folders, adapters, templates, vocabularies."""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import build_model, build_tokenizer, save_adapter

import genarm_fast
from genarm_fast import ARM, GenARM, reference
from genarm_fast.kernels import _native
from genarm_fast.models import weights
from genarm_fast.models.checkpoint import check_device
from genarm_fast.models.weights import share_weights

PROMPT = {"prompts": [5, 6, 7], "max_new_tokens": 10, "seed": 1, "ignore_eos": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders as training writes them: base (with tokenizer), other (weights only), and an adapter of base."""
    root = tmp_path_factory.mktemp("members")
    base = build_model("llama", 0)
    base.save_pretrained(root / "base")
    build_tokenizer().save_pretrained(root / "base")
    build_model("llama", 1).save_pretrained(root / "other")
    save_adapter(root / "adapter", base=root / "base", seed=2)
    return root


def test_folders(folders, tokenizer):
    """An ARM without tokenizer files takes the base's tokenizer and chat template."""
    model = GenARM.from_pretrained(folders / "base", [str(folders / "other"), ARM(folders / "other", weight=-2)])
    assert model.arm_names == ["other", "other2"]
    assert model.arms[0].tokenizer is model.tokenizer
    assert model.arms[0].model is model.arms[1].model
    assert model.arms[0].chat_template == model.tokenizer.chat_template
    given = GenARM.from_pretrained(build_model("llama", 0), [build_model("llama", 1)] * 2, tokenizer=tokenizer)
    output = model.generate(**PROMPT)[0]
    assert output.token_ids == given.generate(**PROMPT, weights=[1, -2])[0].token_ids
    assert output.completions[0].weights[0] == (1.0, -2.0)


def test_a_compiled_model_is_what_is_inside(tokenizer):
    model = GenARM.from_pretrained(torch.compile(build_model("llama", 0)), tokenizer=tokenizer)
    given = GenARM.from_pretrained(build_model("llama", 0), tokenizer=tokenizer)
    assert model.generate(**PROMPT)[0].token_ids == given.generate(**PROMPT)[0].token_ids


def test_names_of_other_drafters_are_taken(folders):
    """With such a name, `Speculation` could not tell the ARM from the drafter."""
    shutil.copytree(folders / "other", folders / "ngram")
    model = GenARM.from_pretrained(folders / "base", [folders / "ngram", ARM(folders / "other", name="mine")])
    assert model.arm_names == ["ngram2", "mine"]
    with pytest.raises(ValueError, match="name='base': expected another one than base, ngram, draft_model"):
        GenARM.from_pretrained(folders / "base", ARM(folders / "other", name="base"))
    with pytest.raises(TypeError, match="name=5: expected a string"):
        ARM(folders / "other", name=5)


def test_adapter_shares_the_weights_of_the_base(folders, tmp_path):
    """The adapter equals the merged model, and the base stays bare."""
    merged = save_adapter(tmp_path / "adapter", base=folders / "base", seed=2)
    model = GenARM.from_pretrained(folders / "base", tmp_path / "adapter", dtype=torch.float32)
    base, arm = model.base.model, model.arms[0].model
    own = {p.data_ptr() for name, p in arm.named_parameters() if "lora_" not in name}
    assert own == {p.data_ptr() for p in base.parameters()}
    tokens = torch.tensor([[3, 4, 5, 6]])
    assert torch.allclose(arm(tokens).logits, merged(tokens).logits, atol=1e-4)
    assert torch.equal(base(tokens).logits, build_model("llama", 0)(tokens).logits)
    assert not torch.allclose(arm(tokens).logits, base(tokens).logits, atol=1e-2)


def test_adapter_of_a_given_model(folders):
    """The fingerprint matches the adapter to the given model, wherever its base came from. The model stays as is."""
    base = build_model("llama", 0)
    names = [name for name, _ in base.named_parameters()]
    model = GenARM.from_pretrained(base, folders / "adapter", tokenizer=build_tokenizer())
    assert model.arms[0].model.model.embed_tokens.weight.data_ptr() == base.model.embed_tokens.weight.data_ptr()
    assert [name for name, _ in base.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_two_adapters_of_one_small_backbone(folders, tmp_path):
    """In weak to strong, the ARMs' own base is loaded once, beside the generation base."""
    save_adapter(tmp_path / "one", base=folders / "other", seed=3)
    save_adapter(tmp_path / "two", base=folders / "other", seed=4)
    model = GenARM.from_pretrained(folders / "base", [tmp_path / "one", tmp_path / "two"])
    pointers = [arm.model.lm_head.weight.data_ptr() for arm in model.arms]
    assert pointers[0] == pointers[1] != model.base.model.lm_head.weight.data_ptr()
    assert (
        model.generate(**PROMPT, weights=[1, 0])[0].token_ids != model.generate(**PROMPT, weights=[0, 1])[0].token_ids
    )


def test_adapter_folder_as_base(folders):
    model = GenARM.from_pretrained(folders / "adapter", folders / "base", tokenizer=build_tokenizer())
    swapped = GenARM.from_pretrained(folders / "base", folders / "adapter")
    assert (
        model.generate(**PROMPT, temperature=0)[0].token_ids == swapped.generate(**PROMPT, temperature=0)[0].token_ids
    )
    assert model.base.model.lm_head.weight.data_ptr() == model.arms[0].model.lm_head.weight.data_ptr()


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_adapter_of_another_base_is_refused(folders, tmp_path):
    """The error names both: the adapter's base, and that it is gone or has other weights."""
    save_adapter(tmp_path / "lost", base=folders / "other", recorded_base=tmp_path / "gone", seed=3)
    with pytest.raises(ValueError, match=r"arms\[0\]=.*lost' is an adapter of '.*gone', which can't be loaded.*base'"):
        GenARM.from_pretrained(folders / "base", tmp_path / "lost")
    save_adapter(tmp_path / "wrong", base=folders / "other", recorded_base=folders / "base", seed=3)
    with pytest.raises(ValueError, match=r"wrong' is an adapter of '.*base' with fingerprint .* weights differ"):
        GenARM.from_pretrained(folders / "base", tmp_path / "wrong")


def test_adapter_without_fingerprint_is_believed_with_a_warning(folders, tmp_path):
    shutil.copytree(folders / "adapter", tmp_path / "plain")
    (tmp_path / "plain" / "genarm.json").unlink()
    with pytest.warns(UserWarning, match="no fingerprint"):
        model = GenARM.from_pretrained(folders / "base", tmp_path / "plain")
    assert model.arms[0].model.lm_head.weight.data_ptr() == model.base.model.lm_head.weight.data_ptr()


def test_recorded_templates(folders, tmp_path):
    """An ARM uses the templates in genarm.json; arguments take precedence."""
    save_adapter(tmp_path / "arm", base=folders / "base", seed=2, prompt_template="<{prompt}>", chat_template="{chat")
    plain, given = GenARM.from_pretrained(
        folders / "base", [tmp_path / "arm", ARM(tmp_path / "arm", prompt_template="({prompt})", chat_template="{own")]
    ).arms
    assert (plain.prompt_template, plain.chat_template) == ("<{prompt}>", "{chat")
    assert (given.prompt_template, given.chat_template) == ("({prompt})", "{own")


def test_tokenizers_that_disagree(folders, tmp_path, tokenizer):
    shutil.copytree(folders / "other", tmp_path / "arm")
    tokenizer.save_pretrained(tmp_path / "arm")
    path = tmp_path / "arm" / "tokenizer.json"
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    names = {i: token for token, i in vocab.items()}
    vocab[names[40]], vocab[names[41]] = 41, 40
    path.write_text(json.dumps(data))
    expected = f"arm: .* at token id 40 of the 300 in common: got '{names[41]}', expected '{names[40]}'"
    with pytest.raises(ValueError, match=expected):
        GenARM.from_pretrained(folders / "base", tmp_path / "arm")


def test_a_longer_tokenizer_only_shortens_the_common_vocabulary(folders, tmp_path, tiny_model):
    """An example is tulu-2's <pad> after Llama's 32,000 tokens."""
    longer = build_tokenizer()
    longer.add_tokens(["<pad>"])
    tiny_model(seed=3, vocab_size=301).save_pretrained(tmp_path / "arm")
    longer.save_pretrained(tmp_path / "arm")
    assert GenARM.from_pretrained(folders / "base", tmp_path / "arm").vocab_size == 300
    assert GenARM.from_pretrained(tmp_path / "arm", folders / "base").vocab_size == 300


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: {"base": f / "nowhere"}, "base='.*nowhere': no such folder"),
        (lambda f: {"base": f / "other"}, "tokenizer=None: expected a tokenizer"),
        (lambda f: {"base": f / "base", "arms": [ARM(f / "other", name="a"), ARM(f / "base", name="a")]}, "name='a'"),
        (
            lambda f: {"base": f / "base", "prompt_template": "no place"},
            "prompt_template='no place': expected .*{prompt}",
        ),
        (lambda f: {"base": f / "base", "max_batch_size": 0}, "max_batch_size=0: expected"),
        (lambda f: {"base": f / "base", "arms": [ARM(f / "other", weight=float("nan"))]}, "weight=nan: expected a f"),
        (lambda f: {"base": f / "base" / "config.json"}, "base='.*config.json': expected a folder or .*got a file"),
        (
            lambda f: {"base": f / "base", "chat_template": "/c.jinja"},
            "base: chat_template='/c.jinja': expected a Jinja",
        ),
        (lambda f: {"base": f / "base", "arms": [ARM(f / "base", chat_template="x")]}, "base2: chat_template='x': ex"),
        *(
            (lambda f, dtype=dtype: {"base": f / "base", "dtype": dtype}, "dtype=.*: expected auto, float32, bfloat16")
            for dtype in ("bf16", "int8", float, torch.int64, 16, "__name__")
        ),
    ],
)
def test_errors(folders, make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        GenARM.from_pretrained(**make(folders))


@pytest.mark.skipif(_native.core is None, reason="built without a compiler")
@pytest.mark.parametrize("adapted", [False, True])
def test_weights_are_not_read_where_they_were(tokenizer, adapted):
    base = build_model("llama", 0).bfloat16()
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    arms = get_peft_model(share_weights(base), lora, autocast_adapter_dtype=False) if adapted else []
    model = GenARM.from_pretrained(base, arms, tokenizer=tokenizer)
    tokens = model.generate(**PROMPT)[0].token_ids
    base.share_memory()
    with pytest.raises(RuntimeError, match=rf"^base{', arm' * adapted}: the weight .* was moved in memory after"):
        model.generate(**PROMPT)
    assert GenARM.from_pretrained(base, arms, tokenizer=tokenizer).generate(**PROMPT)[0].token_ids == tokens


@pytest.mark.parametrize("role", ["arms", "draft_model"])
def test_a_misspelt_folder_fails_before_any_model_is_read(folders, monkeypatch, role):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", pytest.fail)
    with pytest.raises(FileNotFoundError, match=rf"{role}.*nowhere': no such folder"):
        GenARM.from_pretrained(folders / "base", **{role: folders / "nowhere"})


def test_hub_ids(monkeypatch, tmp_path, folders, tokenizer):
    """Files that a repository lacks, or that cannot be fetched, count as missing; the others come from its download."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def download(repo, name):
        if name == "genarm.json":
            (tmp_path / name).write_text('{"prompt_template": "<{prompt}>"}')
            return str(tmp_path / name)
        raise LocalEntryNotFoundError("offline") if name == "tokenizer.json" else EntryNotFoundError("missing")

    monkeypatch.setattr("genarm_fast.models.hub.get_hf_file_metadata", lambda url, token: None)
    monkeypatch.setattr("genarm_fast.models.hub.hf_hub_download", download)
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained",
        lambda source, **_: (
            build_model("llama", 1),
            {"missing_keys": (), "unexpected_keys": (), "mismatched_keys": ()},
        ),
    )
    model = GenARM.from_pretrained(folders / "base", "someone/arm", tokenizer=tokenizer)
    assert model.arm_names == ["arm"]
    assert model.arms[0].prompt_template == "<{prompt}>"
    assert model.arms[0].tokenizer is tokenizer


def test_a_repository_that_is_no_model(monkeypatch):
    def fail(source, **_):
        raise OSError("no config.json")

    monkeypatch.setattr("genarm_fast.models.hub.get_hf_file_metadata", lambda url, token: None)
    for module in ("files", "sizes"):
        monkeypatch.setattr(f"genarm_fast.models.{module}.find_file", lambda source, name: None)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(ValueError, match="base='no/model': expected a folder or a hub id that can be loaded: no conf"):
        GenARM.from_pretrained("no/model")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu", "meta", "cdua", "", 3.5, torch.device("cuda")])
def test_devices_that_are_not_here(monkeypatch, folders, device):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    monkeypatch.setattr("genarm_fast.models.checkpoint.ModelLoader.load", lambda *_: pytest.fail("loads"))
    with pytest.raises(ValueError, match=re.escape(f"device={device!r}: expected one that is here: cpu")):
        GenARM.from_pretrained(folders / "base", device=device)


def test_devices_that_are_here(monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    assert [str(check_device(each)) for each in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    with pytest.raises(ValueError, match="device='cuda:2': expected one that is here: cpu, cuda:0, cuda:1"):
        check_device("cuda:2")


def test_arm_types():
    with pytest.raises(TypeError, match="model=3: expected a hub id, a folder or a loaded model"):
        ARM(3)
    with pytest.raises(TypeError, match=r"weight=\[1\]: expected one number"):
        ARM("a", weight=[1])
    with pytest.raises(TypeError, match="weight='1': expected a finite number"):
        ARM("a", weight="1")


@pytest.mark.parametrize("family", ["mamba", "qwen3_next", "t5"])
def test_models_without_plain_attention_are_refused(tokenizer, family):
    from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

    if family == "t5":
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=300, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
        )
    else:
        small = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 300, "intermediate_size": 16}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small))
    with pytest.raises(ValueError, match=f"base: {family} models .* are not supported"):
        GenARM.from_pretrained(model, tokenizer=tokenizer)


def test_shared_weights_stay_tied():
    model = build_model("llama", 0, tie_word_embeddings=True)
    copy = share_weights(model)
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    assert copy.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


class CopiesItself(torch.nn.Linear):
    def __deepcopy__(self, memo):
        memo[id(self)] = copy = CopiesItself(self.in_features, self.out_features)
        copy.copied = True
        return copy


def test_sharing_weights_copies_as_deepcopy_does():
    """The cases are tied modules, modules in any attribute, hooks bound to a module, and modules with a copy method."""
    model = build_model("llama", 0)
    first, second = model.model.layers[:2]
    first.twice = second.mlp
    vars(first)["aside"] = {"of": [second], second: {1, 2}, "empty": set()}
    first.register_forward_hook(first.forward)
    first.own = CopiesItself(2, 2)
    tree = share_weights(model)
    plain = copy.deepcopy(model)
    for (name, module), (_, expected), old in zip(tree.named_modules(), plain.named_modules(), model.modules()):
        assert type(module) is type(expected), name
        assert list(vars(module)) == list(vars(expected)), name
        for attribute, value in vars(module).items():
            assert type(value) is type(vars(expected)[attribute]), attribute
            assert value is not vars(old).get(attribute) or type(value) in weights.ATOMS, attribute
    first, second = tree.model.layers[:2]
    assert first.twice is second.mlp
    assert first.aside["of"][0] is second
    assert first.aside[second] == {1, 2}
    assert [hook.__self__ for hook in first._forward_hooks.values()] == [first]
    assert first.own.copied


def test_an_adapter_whose_base_has_moved(folders, tmp_path):
    """The error says what to do, and doing it works: by folder, and by the model that is loaded anyway."""
    place = tmp_path / "arm"
    merged = save_adapter(place, base=folders / "base", seed=3, recorded_base=tmp_path / "gone")
    (place / "genarm.json").unlink()  # adapters of the hub have no genarm.json
    with pytest.raises(ValueError, match=r"If that base has moved .*: ARM\('.*arm', base=\.\.\.\)"):
        GenARM.from_pretrained(folders / "base", place)
    expected = None
    given = type(merged).from_pretrained(folders / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning for a caller who names the base
        for base, named in ((folders / "base",) * 2, (given, given), (given, folders / "base")):
            tokenizer = build_tokenizer()
            model = GenARM.from_pretrained(base, ARM(place, base=named), tokenizer=tokenizer)
            (output,) = model.generate([[5, 6, 7]], temperature=0.0, max_new_tokens=6)
            expected = expected or output.token_ids
            assert output.token_ids == expected
    run = {"temperature": 0.0, "max_new_tokens": 6, "stop_token_ids": [1]}
    assert expected == reference.generate(given, [merged], [[5, 6, 7]] * 2, [1.0], **run).tokens
    arm = ARM(place, base=given)
    (output,) = genarm_fast.generate(given, arm, [[5, 6, 7]], tokenizer=build_tokenizer(), **run)
    assert output.token_ids == expected


def test_a_base_for_what_is_no_adapter_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"arms\[0\]: base=.*expected none, as its model is no folder of an adapter"):
        GenARM.from_pretrained(folders / "base", ARM(folders / "base", base=folders / "base"))
    with pytest.raises(TypeError, match="base=3: expected a hub id, a folder or a loaded model"):
        ARM("x", base=3)
    wrong = tmp_path / "arm"
    save_adapter(wrong, base=folders / "base", seed=3)
    build_model("llama", 9).save_pretrained(tmp_path / "other")
    build_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"with fingerprint .*differ"):
        GenARM.from_pretrained(folders / "base", ARM(wrong, base=tmp_path / "other"))
