"""`genarm_fast.generate` and `stream`: a model is loaded once, reloaded when it changes, and freed with the owner's."""

from __future__ import annotations

import asyncio
import gc
import inspect
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from threading import Barrier, Event

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import build_model, save_adapter

import genarm_fast
from genarm_fast import ARM, GenARM, SamplingParams, functional, kept

pytestmark = pytest.mark.usefixtures("nothing_kept")
PARAMS = SamplingParams(seed=1, max_new_tokens=6, ignore_eos=True)


@pytest.fixture
def loads(monkeypatch):
    """The models loaded so far, in order."""
    made, load = [], GenARM.from_pretrained.__func__

    def counted(cls, *args, **options):
        made.append(load(cls, *args, **options))
        return made[-1]

    monkeypatch.setattr(GenARM, "from_pretrained", classmethod(counted))
    return made


@pytest.fixture
def folder(tmp_path, tiny_model, tokenizer):
    """The folder of the tiny base, with its tokenizer; beside it `arm`, an adapter of this base."""
    path = tmp_path / "base"
    tiny_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    save_adapter(tmp_path / "arm", base=path, seed=5)
    return path


def tokens(outputs):
    return [output.token_ids for output in outputs]


def adapted(seed=0):
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    return get_peft_model(build_model("llama", 0), config).eval()


def test_what_a_call_gives(tiny_model, tokenizer, loads):
    """Calls return what the methods return. An ARM's weight is the call's, and one engine serves all weights."""
    base, arm = tiny_model(), tiny_model(seed=1)
    for weight in (1.0, -0.5, 1.0):
        arms = ARM(arm, weight=weight)
        expected = GenARM.from_pretrained(base, arms, tokenizer=tokenizer).generate(["hi", [5]], PARAMS)
        before = len(loads)
        assert tokens(genarm_fast.generate(base, arms, ["hi", [5]], PARAMS, tokenizer=tokenizer)) == tokens(expected)
        many = genarm_fast.generate(base, [arms], ["hi", [5]], [PARAMS, PARAMS.override(n=2)], tokenizer=tokenizer)
        assert tokens(many) == tokens(expected)
        with genarm_fast.stream(base, arms, "hi", PARAMS, tokenizer=tokenizer) as stream:
            assert [token for chunk in stream for token in chunk.token_ids] == expected[0].token_ids
        assert len(loads) - before == (1 if before == 1 else 0)
    given = genarm_fast.generate(base, arm, "hi", PARAMS, tokenizer=tokenizer, weights=0.25, rewards=True)[0]
    assert given.completions[0].weights == [(0.25,)] * 6
    assert list(given.rewards) == ["arm"]


def test_what_event_loops_get(tiny_model, tokenizer, loads):
    """Coroutines return the same outputs from the same kept model, and streams raise errors as they begin."""
    given = tiny_model(), ARM(tiny_model(seed=1), weight=-0.5), "hi", PARAMS
    (expected,) = genarm_fast.generate(*given, tokenizer=tokenizer)

    async def asynchronous():
        outputs = await genarm_fast.agenerate(*given, tokenizer=tokenizer, speculation="off")
        stream = genarm_fast.astream(*given, tokenizer=tokenizer, ahead=2)
        chunks = [chunk async for chunk in stream]
        with pytest.raises(TypeError, match="unknown argument 'temprature'"):
            await genarm_fast.agenerate(*given, temprature=1)
        with pytest.raises(TypeError, match="unknown argument 'temprature'"):
            await genarm_fast.astream(*given, temprature=1).__anext__()
        return (
            outputs[0].completions,
            stream.output.completions,
            [token for chunk in chunks for token in chunk.token_ids],
        )

    assert asyncio.run(asynchronous()) == (expected.completions, expected.completions, expected.token_ids)
    with pytest.raises(ValueError, match="ahead=-1"):
        genarm_fast.astream(*given, ahead=-1)
    assert len(loads) == 1


def test_options_and_sampling_parameters_are_told_apart():
    options = set(inspect.signature(GenARM.from_pretrained).parameters) - {"base", "arms"}
    sampling = {field.name for field in fields(SamplingParams)} | {"tools", "chat_template_kwargs"}
    assert not options & sampling
    own = {"base", "arms", "prompts", "sampling_params", "progress", "ahead"}
    for function in (genarm_fast.generate, genarm_fast.stream, genarm_fast.agenerate, genarm_fast.astream):
        assert set(inspect.signature(function).parameters) - own == options | sampling
    assert not (options | sampling) & own


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        (
            {"temprature": 1},
            TypeError,
            "unknown argument 'temprature': .*draft_model.*weights, base_weight, temp",
        ),
        ({"progress": 1, "revision": "main"}, TypeError, "unknown argument 'revision'.*model_kwargs"),
        ({"model_kwargs": 5}, TypeError, "model_kwargs=5: expected a mapping"),
        ({"model_kwargs": {"dtype": "auto"}}, TypeError, "model_kwargs=.*: expected no 'dtype' in it"),
        ({"model_kwargs": {"typo": 1}}, TypeError, "typo: expected no such argument where all members are loaded"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size=0: expected an integer >= 1"),
        ({"temperature": -1}, ValueError, "temperature=-1: expected a finite number >= 0"),
        ({"speculation": "on"}, ValueError, "speculation='on': expected"),
        ({"sampling_params": "ab"}, TypeError, "sampling_params=.*: expected a SamplingParams"),
        ({"base": None}, TypeError, "base=None: expected a hub id, a folder or a loaded model"),
        ({"base": torch.nn.Linear(3, 3)}, TypeError, "base: expected a causal LM of transformers, got Linear"),
        ({"arms": None}, TypeError, "arms=None: expected an ARM"),
        ({"prompt_template": ["a"]}, TypeError, r"prompt_template=\['a'\]: expected a string"),
    ],
)
def test_refusals(tiny_model, tokenizer, keywords, error, message):
    arguments = {"base": tiny_model(), "arms": (), "prompts": "a", "tokenizer": tokenizer} | keywords
    if "progress" not in keywords:
        with pytest.raises(error, match=message):
            genarm_fast.stream(**arguments)
    with pytest.raises(error, match=message):
        genarm_fast.generate(**arguments)


def test_folders(folder, loads):
    for _ in range(2):
        first = genarm_fast.generate(folder, folder.parent / "arm", "hi", PARAMS)
        genarm_fast.generate(str(folder), [str(folder.parent / "arm")], "hi", PARAMS, dtype="auto")
    assert len(loads) == 1
    genarm_fast.generate(folder, folder.parent / "arm", "hi", PARAMS, max_batch_size=2)
    assert len(loads) == 2
    assert tokens(first) == tokens(loads[1].generate("hi", PARAMS))


@pytest.mark.parametrize("changed", ["base", "arm"])
def test_a_folder_that_changed_is_loaded_anew(folder, tokenizer, loads, changed):
    """A change of the base's folder counts too when only the adapter names it."""
    sources = build_model("llama", 0), folder.parent / "arm"
    before = genarm_fast.generate(*sources, "hi", PARAMS, tokenizer=tokenizer)
    assert tokens(genarm_fast.generate(*sources, "hi", PARAMS, tokenizer=tokenizer)) == tokens(before)
    assert len(loads) == 1
    if changed == "base":
        (folder / "notes.txt").write_text("new")
    else:
        save_adapter(folder.parent / "arm", base=folder, seed=6)
    after = genarm_fast.generate(*sources, "hi", PARAMS, tokenizer=tokenizer)
    assert len(loads) == 2
    assert (tokens(after) == tokens(before)) == (changed == "base")


def test_an_adapter_of_weights_that_were_trained_on(folder, tokenizer, loads):
    """The adapter no longer fits the given base, so it gets the base that its folder names."""
    base = build_model("llama", 0)
    for count in (1, 2):
        found = genarm_fast.generate(base, folder.parent / "arm", "hi", PARAMS, tokenizer=tokenizer)
        assert len(loads) == count
        expected = GenARM.from_pretrained(base, folder.parent / "arm", tokenizer=tokenizer).generate("hi", PARAMS)
        assert tokens(found) == tokens(expected)
        del loads[count:]
        in_place(base)


def in_place(model):
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1)


def by_data(model):
    model.get_input_embeddings().weight.data.mul_(-1)


def rebound(model):
    weight = model.get_input_embeddings().weight
    weight.data = -weight.data


def hooked(model):
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: -output)


def new_module(model):
    inner = model.get_base_model()
    inner.model.layers[0].mlp.act_fn = torch.nn.ReLU()


def merged(model):
    model.merge_adapter()


def disabled(model):
    model.base_model.disable_adapter_layers()


def scaled(model):
    for module in model.modules():
        if hasattr(module, "merged_adapters"):
            module.scaling["default"] *= -3


@pytest.mark.parametrize("change", [in_place, by_data, rebound, hooked, new_module, disabled, scaled, merged])
@pytest.mark.parametrize("role", ["base", "arm"])
def test_a_model_that_changed_is_noticed(tiny_model, tokenizer, loads, change, role):
    """The next call returns what a new `GenARM` would. Weights that changed in place need no new load."""
    model, other = adapted(), tiny_model(seed=1)

    def sources():
        return (model, other) if role == "base" else (other, model)

    before = genarm_fast.generate(*sources(), "hi", PARAMS, tokenizer=tokenizer)
    change(model)
    after = genarm_fast.generate(*sources(), "hi", PARAMS, tokenizer=tokenizer)
    assert len(loads) == (1 if change in (in_place, by_data) else 2)
    assert tokens(after) == tokens(GenARM.from_pretrained(*sources(), tokenizer=tokenizer).generate("hi", PARAMS))
    assert (tokens(after) == tokens(before)) == (change is merged)


def test_another_active_adapter(tiny_model, tokenizer, loads):
    model = adapted()
    model.add_adapter("second", LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights=False))
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        found = genarm_fast.generate(tiny_model(), model, "hi", PARAMS, tokenizer=tokenizer)
        expected = GenARM.from_pretrained(tiny_model(), model, tokenizer=tokenizer).generate("hi", PARAMS)
        assert tokens(found) == tokens(expected)
    stale = ARM(model)
    model.set_adapter("default")
    with pytest.raises(ValueError, match="its active adapter was second when the ARM was made and is default now"):
        genarm_fast.generate(tiny_model(), stale, "hi", PARAMS, tokenizer=tokenizer)


@pytest.mark.parametrize("make", [lambda: build_model("llama", 3), adapted])
def test_models_are_freed_with_their_owner(tiny_model, tokenizer, loads, make):
    """The modules, their memory and the kept engine are freed, all at once with the owner's modules."""
    model = make()
    genarm_fast.generate(model, tiny_model(seed=1), "hi", PARAMS, tokenizer=tokenizer)
    (entry,) = functional._kept._entries.values()
    alive = [weakref.ref(each) for each in (model, model.get_input_embeddings(), entry, loads[0], loads[0].base.model)]
    storage = weakref.ref(model.get_input_embeddings().weight.untyped_storage())
    engine = weakref.ref(loads.pop().engine())
    del entry
    gc.collect()
    gc.disable()
    try:
        del model
        if make is adapted:  # PEFT's modules refer to each other in a circle
            gc.collect()
        assert [each() for each in (*alive, engine, storage)] == [None] * 7
    finally:
        gc.enable()
    assert not functional._kept._entries


def test_warming_up(tiny_model, tokenizer, loads, monkeypatch):
    """The first call with warm_up=True warms up the kept model, at load or later, and needs no second model."""
    warmed = []
    monkeypatch.setattr(GenARM, "warm_up", lambda self: warmed.append(self))
    for count, warm in ((0, False), (1, True), (1, True), (1, False)):
        genarm_fast.generate(tiny_model(), (), "hi", PARAMS, tokenizer=tokenizer, warm_up=warm)
        assert warmed == loads * count
    for _ in range(2):
        genarm_fast.generate(tiny_model(), (), "hi", PARAMS, tokenizer=tokenizer, warm_up=True, max_batch_size=2)
    assert warmed == loads
    assert len(loads) == 2


def test_release(folder, loads):
    genarm_fast.generate(folder, (), "hi", PARAMS)
    with genarm_fast.stream(folder, (), "hi", PARAMS) as stream:
        next(stream)
        genarm_fast.release()
        assert len(list(stream)) == 5  # the open stream continues
    model = weakref.ref(loads.pop())
    del stream
    gc.collect()
    assert model() is None
    genarm_fast.generate(folder, (), "hi", PARAMS)
    assert len(loads) == 1


def test_a_failed_load_leaves_nothing(folder, loads):
    with pytest.raises(ValueError, match="weights"):
        genarm_fast.generate(folder, build_model("llama", 1), "hi", PARAMS, weights=[1.0, 2.0])
    assert len(loads) == 1
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json"):
        genarm_fast.generate(folder, (), "hi", PARAMS)
    assert all(entry.model is not None for entry in functional._kept._entries.values())


def test_threads_load_once(tiny_model, tokenizer, monkeypatch, loads):
    """Threads that ask for the same model share one load; a thread that asks for another does not wait for it."""
    slow, entered, go = build_model("llama", 4), Event(), Event()
    load, start = GenARM.from_pretrained, Barrier(3)

    def held(cls, base, *args, **options):
        if base.config.bos_token_id == 7:
            entered.set()
            assert go.wait(60)
        return load(base, *args, **options)

    slow.config.bos_token_id = 7
    monkeypatch.setattr(GenARM, "from_pretrained", classmethod(held))

    def call(_):
        start.wait(60)
        return genarm_fast.generate(slow, (), "hi", PARAMS, tokenizer=tokenizer)[0].token_ids

    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(call, i) for i in range(3)]
        assert entered.wait(60)
        genarm_fast.generate(tiny_model(), (), "hi", PARAMS, tokenizer=tokenizer)
        go.set()
        assert len({tuple(each.result()) for each in calls}) == 1
    assert len(loads) == 2


def test_bounded_by_bytes(folder, tiny_model, tokenizer, loads, monkeypatch):
    """The least recently used model goes first, before a load. Weights of models the caller loaded do not count."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    genarm_fast.generate(folder, (), "hi", PARAMS)
    assert functional._kept._entries[next(iter(functional._kept._entries))].weights == pytest.approx(size, rel=0.05)
    caches = loads[0].workspace_bytes
    assert caches > 0
    monkeypatch.setenv(kept.LIMIT, str(2 * size + 3 * caches))
    genarm_fast.generate(folder, (), "hi", PARAMS, max_batch_size=2)
    genarm_fast.generate(tiny_model(), (), "hi", PARAMS, tokenizer=tokenizer)
    assert len(functional._kept._entries) == 3
    genarm_fast.generate(folder, (), "hi", PARAMS)  # the first is the latest now
    genarm_fast.generate(folder, (), "hi", PARAMS, max_batch_size=3)
    assert len(loads) == 4
    genarm_fast.generate(folder, (), "hi", PARAMS)
    assert len(loads) == 4
    genarm_fast.generate(folder, (), "hi", PARAMS, max_batch_size=2)
    assert len(loads) == 5
    monkeypatch.setenv(kept.LIMIT, "0")  # the latest model stays
    for _ in range(2):
        genarm_fast.generate(folder, (), "hi", PARAMS, max_batch_size=4)
    assert len(loads) == 6
    assert len(functional._kept._entries) == 1
    monkeypatch.setenv(kept.LIMIT, "2GB")
    with pytest.raises(ValueError, match="GENARM_FAST_KEEP_BYTES='2GB': expected a number of bytes"):
        genarm_fast.generate(folder, (), "hi", PARAMS, max_batch_size=5)


def test_weights_by_name_leave_the_others_at_their_own(tiny_model, tokenizer):
    """ARMs without a weight in the call use their own, also if a call with other weights loaded the model."""
    base, first, second = tiny_model(), tiny_model(seed=1), tiny_model(seed=2)
    run = {"tokenizer": tokenizer, "temperature": 0.0, "max_new_tokens": 8}

    def call(weight, weights):
        arms = [ARM(first, weight=weight, name="a"), ARM(second, name="b")]
        return genarm_fast.generate(base, arms, [[5, 6, 7]], weights=weights, **run)[0].token_ids

    call(0.0, None)
    assert call(3.0, {"b": 0.5}) == call(3.0, [3.0, 0.5]) != call(0.0, [0.0, 0.5])
    params = SamplingParams(weights={"b": 0.5})
    arms = [ARM(first, weight=3.0, name="a"), ARM(second, name="b")]
    assert genarm_fast.generate(base, arms, [[5, 6, 7]], params, **run)[0].token_ids == call(3.0, [3.0, 0.5])
