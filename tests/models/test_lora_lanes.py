"""Members of one backbone in one forward, compared with merged models and the naive reference."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from against_reference import assert_equals_reference, random_params, random_prompts
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import build_model, build_tokenizer, save_adapter

from genarm_fast import ARM, GenARM, SamplingParams, reference
from genarm_fast.engine.model_runner import ModelRunner
from genarm_fast.models import lora_lanes
from genarm_fast.models.forward_context import running
from genarm_fast.models.lora_lanes import LaneLinear, share_forwards
from genarm_fast.models.weights import share_weights

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LORAS = {
    "few": LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj", "down_proj"]),
    "all": LoraConfig(
        r=3,
        lora_alpha=4,
        use_rslora=True,
        target_modules="all-linear",
        rank_pattern={"up_proj": 5, "layers.1.self_attn.k_proj": 1},
        alpha_pattern={"o_proj": 9},
    ),
    "head": LoraConfig(r=2, lora_alpha=1, target_modules=["v_proj", "lm_head"], layers_to_transform=[1]),
}


def build_base():
    return build_model("llama", 0, attention_bias=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("lanes")
    build_base().save_pretrained(root / "base")
    build_tokenizer().save_pretrained(root / "base")
    return root


@pytest.fixture(scope="module")
def merged(folders):
    """The merged models by adapter name; makes the adapter folders once."""
    return {
        name: save_adapter(folders / name, base=folders / "base", seed=i, config=config)
        for i, (name, config) in enumerate(LORAS.items())
    }


def lane_rows(model, monkeypatch):
    """Return the row counts of the shared forwards that compute logits, in order."""
    rows, logits = [], ModelRunner.logits

    def counted(self, kv_bound, lanes, tokens, positions, of_cache):
        assert self.model is model.base.shared
        rows.append(len(of_cache))
        return logits(self, kv_bound, lanes, tokens, positions, of_cache)

    monkeypatch.setattr(ModelRunner, "logits", counted)
    return rows


def assert_equals_merged(model, arms, output, **params):
    """Compare as `assert_equals_reference` does, with merged models in place of the adapters."""
    original = [arm.model for arm in model.arms]
    for arm, merged_model in zip(model.arms, arms):
        arm.model = merged_model
    try:
        assert_equals_reference(model, output, **params)
    finally:
        for arm, adapted in zip(model.arms, original):
            arm.model = adapted


def test_a_callers_autocast_changes_nothing(merged, folders, tokenizer):
    """The autocast stands for a training loop that looks at samples."""

    def look():
        arms = [folders / "few", build_model("qwen2", 1)]
        model = GenARM.from_pretrained(folders / "base", arms, tokenizer=tokenizer, dtype=torch.float32)
        output = model.generate([5, 6, 7], seed=1, max_new_tokens=8, repetition_penalty=1.1, rewards=True)[0]
        return output.completions, model.score([5, 6], [7, 8])[0].rewards

    expected = look()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert look() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_given_adapter_may_be_trained_on(tokenizer, dtype):
    """A training loop looks at samples between steps: base and PEFT model belong to the caller."""
    base = build_base().to(dtype)
    peft = get_peft_model(share_weights(base), LoraConfig(r=4, target_modules=ATTENTION), autocast_adapter_dtype=False)
    loras = [p for name, p in peft.named_parameters() if "lora_" in name]
    params = SamplingParams(seed=1, max_new_tokens=12, ignore_eos=True)

    def load():
        model = GenARM.from_pretrained(base, peft, tokenizer=tokenizer)
        assert model.base.shared is model.arms[0].shared
        return model

    model = load()
    outputs = []
    for step in range(3):  # the second call runs in the caches that the first one left
        outputs.append(model.generate([5, 6, 7], params)[0].token_ids)
        assert outputs[-1] == load().generate([5, 6, 7], params)[0].token_ids
        rewards = [each.score([5, 6], [7, 8])[0].rewards["arm"].tokens for each in (model, load())]
        assert rewards[0] == rewards[1]
        torch.manual_seed(step)
        for p in loras:
            p.data += torch.randn_like(p)
    assert len({tuple(tokens) for tokens in outputs}) == 3
    prompted = get_peft_model(build_base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"arms\[0\]: PROMPT_TUNING adapters add virtual tokens"):
        GenARM.from_pretrained(base, prompted, tokenizer=tokenizer)


@pytest.mark.parametrize("case", range(8))
def test_equals_merged_models(folders, merged, tiny_model, case):
    """Lanes run beside a separate model, with different prompts, parameters, ends and numbers of completions."""
    rng = random.Random(case)
    names = rng.sample(list(LORAS), rng.randint(1, 3))
    arms = [*(folders / name for name in names), tiny_model(seed=1)]
    model = GenARM.from_pretrained(folders / "base", arms, max_batch_size=rng.randint(1, 5))
    assert all(arm.shared is model.base.shared for arm in model.arms[:-1])
    assert model.arms[-1].shared is model.arms[-1].model
    prompts = random_prompts(rng, rng.randint(1, 4))
    params = [random_params(rng, len(arms)) for _ in prompts]
    shown = {"rewards": rng.random() < 0.5, "logprobs": rng.choice([None, 3]), "n": rng.randint(1, 3)}
    outputs = model.generate(prompts, [SamplingParams(**each, seed=rng.getrandbits(64), **shown) for each in params])
    for output, each in zip(outputs, params):
        assert_equals_merged(model, [*(merged[name] for name in names), tiny_model(seed=1)], output, **each)


def test_own_templates(folders, merged):
    """Prompts of one batch differ by lane and row; one lane is the base under another template."""
    templates = ["Q {prompt} A", "the answer to {prompt} is:", "{prompt}", "{prompt} and then"]
    models = [folders / "few", folders / "all", folders / "base"]
    arms = [ARM(model, prompt_template=template) for model, template in zip(models, templates[1:])]
    model = GenARM.from_pretrained(folders / "base", arms, prompt_template=templates[0])
    assert len({id(member.shared) for member in model.members}) == 1
    texts, params = ["hi", "the cat sat on the mat"], {"max_new_tokens": 9, "weights": [1.5, -0.6, 0.4]}
    outputs = model.generate(texts, seed=2, rewards=True, **params)
    for text, output in zip(texts, outputs):
        prompts = [model.tokenizer(template.format(prompt=text))["input_ids"] for template in templates]
        assert_equals_merged(model, [merged["few"], merged["all"], build_base()], output, prompts=prompts, **params)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_lane_linear_is_pefts_linear(folders, merged, dtype, tolerance):
    model = GenARM.from_pretrained(folders / "base", [folders / name for name in LORAS], dtype=dtype)
    found = {name: layer for name, layer in model.base.shared.named_modules() if isinstance(layer, LaneLinear)}
    assert len(found) == 2 * 7 + 1
    for lanes in ([0, 1, 2, 3], [2, 0], [3, 1]):
        for name, layer in found.items():
            x = torch.randn(len(lanes) * 2, 3, layer.linear.in_features, dtype=dtype)
            with torch.no_grad(), running(lanes, 2):
                pieces = layer(x).split(2)
            for i, lane in enumerate(lanes):
                expected = model.members[lane].model.get_submodule(name)(x[2 * i : 2 * i + 2])
                torch.testing.assert_close(pieces[i], expected, atol=tolerance, rtol=tolerance)


def test_only_weighted_lanes_run(folders, merged, monkeypatch):
    """Finished rows leave every lane."""
    model = GenARM.from_pretrained(folders / "base", [folders / "few", folders / "all"])
    model.generate([5], weights=[0, 1], max_new_tokens=1)  # runs the self-check first
    rows = lane_rows(model, monkeypatch)
    params = [SamplingParams(seed=i, max_new_tokens=3 + 3 * i, ignore_eos=True, weights=[0, -0.8]) for i in range(2)]
    outputs = model.generate([[5, 6, 7], [8, 9]], params)
    assert rows == [4, 4, 4, 2, 2, 2]
    for output, each in zip(outputs, params):
        assert_equals_merged(
            model,
            [merged["few"], merged["all"]],
            output,
            weights=[0, -0.8],
            max_new_tokens=each.max_new_tokens,
            ignore_eos=True,
        )
    rows.clear()
    model.generate([5, 6, 7], weights=0, max_new_tokens=3)
    assert rows == [1, 1, 1]  # only the base's lane


def test_prefill_is_shared_by_completions(folders, merged, monkeypatch):
    model = GenARM.from_pretrained(folders / "base", folders / "few")
    model.generate([5], max_new_tokens=1)  # runs the self-check first
    sizes, prefill = [], ModelRunner.prefill
    monkeypatch.setattr(
        ModelRunner, "prefill", lambda self, ids, *rest: sizes.append(tuple(ids.shape)) or prefill(self, ids, *rest)
    )
    rows = lane_rows(model, monkeypatch)
    model.generate(list(range(5, 15)), n=3, max_new_tokens=2, ignore_eos=True)
    assert sizes == [(2, 1, 9)]
    assert rows == [6, 6]


def test_stream_changes_weights(folders, merged):
    model = GenARM.from_pretrained(folders / "base", [folders / "few", folders / "head"])
    schedule = [[1.0, 0.0], [0.0, 2.0], [-1.0, 0.5], [0.0, 0.0]] * 3
    with model.stream([5, 6, 7], seed=3, max_new_tokens=12, ignore_eos=True, weights=schedule[0]) as stream:
        for step, _ in enumerate(stream, start=1):
            stream.set_weights(schedule[step % 12])
    expected = reference.generate(
        build_base(),
        [merged["few"], merged["head"]],
        [[5, 6, 7]] * 3,
        lambda step: schedule[step],
        seed=3,
        max_new_tokens=12,
    )
    assert stream.output.token_ids == expected.tokens


def test_threads_do_not_see_each_others_lanes(folders, merged):
    model = GenARM.from_pretrained(folders / "base", [folders / name for name in LORAS])
    params = [{"weights": w, "seed": 1, "max_new_tokens": 30} for w in ([1, 0, 0], [0, 2, 0], [1, -1, 1], [0, 0, 2])]

    def tokens(each):
        return model.generate([5, 6, 7], ignore_eos=True, **each)[0].token_ids

    alone = [tokens(each) for each in params]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokens, params * 2)) == alone * 2


def test_weights_are_in_memory_once(folders, merged):
    """The shared tree uses the tensors of the given base, which stays as it was."""
    base = build_base()
    modules = {name: type(module) for name, module in base.named_modules()}
    model = GenARM.from_pretrained(base, [folders / "few", folders / "all"], tokenizer=build_tokenizer())
    assert {name: type(module) for name, module in base.named_modules()} == modules
    assert all(parameter.requires_grad for parameter in base.parameters())
    shared = model.base.shared
    assert shared is not base
    assert {p.data_ptr() for p in shared.parameters()} == {p.data_ptr() for p in base.parameters()}


def test_adapters_of_a_small_backbone(folders, merged):
    """In weak to strong the ARMs share a forward and the base has its own. An adapter may be the base."""
    model = GenARM.from_pretrained(
        build_model("llama", 7), [folders / "few", folders / "all"], tokenizer=build_tokenizer()
    )
    assert model.base.shared is model.base.model
    assert model.arms[0].shared is model.arms[1].shared is not model.arms[0].model
    params = {"weights": [1.0, -0.5], "max_new_tokens": 10, "ignore_eos": True}
    assert_equals_merged(
        model, [merged["few"], merged["all"]], model.generate([5, 6, 7], seed=1, **params)[0], **params
    )
    model = GenARM.from_pretrained(folders / "few", [folders / "all"], tokenizer=build_tokenizer())
    assert model.base.shared is model.arms[0].shared
    output = model.generate([5, 6, 7], seed=1, max_new_tokens=10, ignore_eos=True)[0]
    model.base.model = merged["few"]
    assert_equals_merged(model, [merged["all"]], output, weights=[1.0], max_new_tokens=10, ignore_eos=True)


SEPARATE = {
    "dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "modules_to_save": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embeddings": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6]),
    "bias": LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
    "bias of linears": LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"),
    "lora_bias": LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("kind", SEPARATE)
def test_other_adapters_keep_their_forward(folders, merged, tmp_path, kind):
    """Beside lanes, such adapters are computed as PEFT computes them."""
    other = save_adapter(tmp_path / "other", base=folders / "base", seed=9, config=SEPARATE[kind])
    model = GenARM.from_pretrained(folders / "base", [folders / "few", tmp_path / "other"])
    assert model.base.shared is model.arms[0].shared is not model.base.model
    assert model.arms[1].shared is model.arms[1].model
    assert all(torch.equal(*pair) for pair in zip(model.base.model.parameters(), build_base().parameters()))
    params = {"weights": [0.7, 1.2], "max_new_tokens": 10, "ignore_eos": True}
    assert_equals_merged(model, [merged["few"], other], model.generate([5, 6, 7], seed=1, **params)[0], **params)


@pytest.mark.parametrize(
    ("family", "targets", "lanes"),
    [
        ("gpt2", ["c_attn"], False),  # gpt2 uses Conv1D
        ("qwen2_moe", ["shared_expert.up_proj"], False),  # sees rows and positions as one dimension
        ("qwen2_moe", ATTENTION, True),
        ("gemma2", "all-linear", True),
        ("mistral", ATTENTION, True),
    ],
)
def test_families(tmp_path, tokenizer, family, targets, lanes):
    """Prompts are longer than the sliding windows of 8 tokens."""
    build_model(family, 0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=3, target_modules=targets)
    merged = [
        save_adapter(tmp_path / name, base=tmp_path / "base", seed=i, config=config) for i, name in enumerate("ab")
    ]
    model = GenARM.from_pretrained(tmp_path / "base", [tmp_path / "a", ARM(tmp_path / "b", weight=-0.5)])
    assert [member.shared is model.base.shared for member in model.members] == [True, lanes, lanes]
    outputs = model.generate(random_prompts(random.Random(0), 3, 25), max_new_tokens=9, ignore_eos=True)
    for output in outputs:
        assert_equals_merged(model, merged, output, max_new_tokens=9, ignore_eos=True, weights=[1, -0.5])


@pytest.mark.parametrize(
    ("family", "targets", "trials"),
    [("llama", ATTENTION, 0), ("llama", ["q_proj", "lm_head"], 1), ("gemma2", ATTENTION, 1)],
)
def test_known_decoders_need_no_trial(tmp_path, tokenizer, monkeypatch, family, targets, trials):
    """Known decoders pass all rows to their linears in order. A head belongs to no decoder, so it needs a trial."""
    tried = []
    monkeypatch.setattr(lora_lanes, "_keeps_rows", lambda model, lanes: not tried.append(lanes))
    build_model(family, 0, tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "arm", base=tmp_path / "base", seed=1, config=LoraConfig(r=3, target_modules=targets))
    model = GenARM.from_pretrained(tmp_path / "base", tmp_path / "arm")
    assert model.arms[0].shared is model.base.shared
    assert len(tried) == trials


def test_loading_an_adapter_draws_no_numbers(folders):
    """The matrices that PEFT would draw come from the folder, and the caller's generator keeps its state."""
    before = torch.get_rng_state()
    GenARM.from_pretrained(folders / "base", folders / "few")
    assert torch.equal(torch.get_rng_state(), before)


def test_adapters_of_another_dtype_or_state_keep_their_forward(folders, merged):
    """One layer in another dtype, a hook, or a replaced forward keeps the adapter out of the shared forward."""
    base = build_base()

    def lanes(change):
        model = GenARM.from_pretrained(base, folders / "few", tokenizer=build_tokenizer())
        change(model.arms[0].model)
        return share_forwards([member.model for member in model.members])[0] is not base

    assert lanes(lambda arm: None)
    assert not lanes(lambda arm: arm.model.layers[0].self_attn.q_proj.lora_A.double())
    assert not lanes(lambda arm: arm.model.layers[0].mlp.register_forward_hook(lambda *_: None))
    assert not lanes(lambda arm: arm.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda *_: None))
    assert not lanes(lambda arm: setattr(arm.lm_head, "forward", arm.lm_head.forward))
    assert not lanes(lambda arm: arm.model.layers[0].self_attn.q_proj.enable_adapters(False))
    assert not lanes(lambda arm: arm.model.layers[0].self_attn.q_proj.merge())
