"""The kept model that a call finds, the checks before a load, and loads in several threads."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from coroutines import run
from tiny_models import build_model

from genarm_fast import ARM, GenARM, SamplingParams, functional, kept
from genarm_fast.models.checkpoint import ModelLoader

pytestmark = pytest.mark.usefixtures("nothing_kept")
PARAMS = SamplingParams(seed=1, max_new_tokens=6, ignore_eos=True)
OTHERS = {  # another value of each field that says how to load an ARM
    "name": "other",
    "prompt_template": "a{prompt}",
    "chat_template": "b",
    "trust_remote_code": True,
    "quantization": "int4",
    "active": ("second",),
}


@pytest.fixture
def folders(tmp_path, tokenizer):
    """Folders of a base in bfloat16 and an ARM in float32."""
    made = {"base": build_model("llama", 0, hidden_size=64).to(torch.bfloat16), "arm": build_model("llama", 1)}
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path / "base", tmp_path / "arm"


@pytest.fixture
def never_loads(monkeypatch):
    monkeypatch.setattr(GenARM, "from_pretrained", lambda *_, **__: pytest.fail("it is loaded"))


def tokens(outputs):
    return [output.token_ids for output in outputs]


def test_all_that_an_arm_says_of_loading_is_in_the_key():
    plain = kept._key("b", [ARM("a")], {})
    assert plain == kept._key("b", [ARM("a", weight=2.0)], {})
    named = {field.name for field in dataclasses.fields(ARM)} - {"model", "base", "weight"}
    assert named == set(OTHERS)
    for name, value in OTHERS.items():
        other = ARM("a")
        object.__setattr__(other, name, value)
        assert kept._key("b", [other], {}) != plain, name


def test_an_arm_in_fewer_bits_is_another_one(folders, tmp_path, tokenizer):
    base, _ = folders
    coarse = ARM(base, quantization="int4", weight=3.0)
    found = [tokens(functional.generate(base, arm, "hi", PARAMS)) for arm in (coarse, ARM(base, weight=3.0), coarse)]
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"temperature": -1}, ValueError, "temperature=-1"),
        ({"sampling_params": [PARAMS], "top_k": 1.5}, TypeError, "top_k=1.5"),
        ({"prompts": ""}, ValueError, r"prompts\[0\]=''"),
        ({"prompts": 5}, TypeError, "prompts=5"),
        ({"tools": [1]}, TypeError, "tools"),
        ({"speculation": "often"}, ValueError, "speculation='often'"),
        ({"warm_up": "yes"}, TypeError, "warm_up='yes': expected True or False"),
        ({"model_kwargs": []}, TypeError, r"model_kwargs=\[\]: expected a mapping"),
    ],
)
def test_refused_before_a_model_is_loaded(tiny_model, never_loads, keywords, error, message):
    arguments = {"base": tiny_model(), "arms": (), "prompts": "a"} | keywords
    with pytest.raises(error, match=message):
        functional.generate(**arguments)
    assert not functional._kept._entries


def test_what_is_right_together_is_not_refused(tiny_model, tokenizer):
    long = PARAMS.override(max_new_tokens=200, ignore_eos=False)
    (output,) = functional.generate(tiny_model(), (), ["hi"], [long], tokenizer=tokenizer, min_new_tokens=150)
    assert len(output.token_ids) >= 150


def test_arguments_of_later_calls(tiny_model, tokenizer):
    """Arguments of later calls are checked like those of the first."""
    given = tiny_model(), (), "hi", PARAMS
    functional.generate(*given, tokenizer=tokenizer)
    for warm in ("yes", 1, []):
        with pytest.raises(TypeError, match=r"warm_up=.*: expected True or False"):
            functional.generate(*given, tokenizer=tokenizer, warm_up=warm)


def test_warming_up_waits_for_an_idle_model(tiny_model, tokenizer, monkeypatch):
    """A call beside a running request is no error; a later one warms up."""
    given, options = (tiny_model(), (), "hi", PARAMS), {"tokenizer": tokenizer, "speculation": "off"}
    expected = tokens(functional.generate(*given, **options))
    warmed, warm_up = [], GenARM.warm_up
    monkeypatch.setattr(GenARM, "warm_up", lambda self: (warm_up(self), warmed.append(self)))
    with functional.stream(*given, **options) as stream:
        next(stream)
        assert tokens(functional.generate(*given, **options, warm_up=True)) == expected
        assert not warmed
    for _ in range(2):
        assert tokens(functional.generate(*given, **options, warm_up=True)) == expected
    assert len(warmed) == 1


@pytest.mark.parametrize("changed", ["a subfolder", "further templates"])
def test_changes_below_a_folder(folders, tmp_path, tokenizer, changed):
    whole = tmp_path / "whole"
    tokenizer.save_pretrained(whole)
    inside = whole / "sub"
    build_model("llama", 0).save_pretrained(inside)
    (whole / "additional_chat_templates").mkdir()
    template = whole / "additional_chat_templates" / "more.jinja"
    template.write_text("a")

    def model():
        return functional.kept_model(whole, [], {"tokenizer": tokenizer, "model_kwargs": {"subfolder": "sub"}})

    first = model()
    assert model() is first
    if changed == "a subfolder":
        build_model("llama", 7).save_pretrained(inside)
    else:
        template.write_text("ab")
    assert model() is not first


def test_one_that_is_dropped_as_it_is_asked_for(tiny_model, tokenizer):
    """Another thread drops the model to make room at the moment it is asked for; the call still counts as using it."""

    class Dropping(OrderedDict):
        def setdefault(self, key, entry):
            entry = super().setdefault(key, entry)
            if entry.model is None:
                del self[key]
            return entry

    models = kept.KeptModels()
    models._entries = Dropping()
    model = models.get(tiny_model(), [], {"tokenizer": tokenizer})
    assert len(model.generate("hi", PARAMS)[0].token_ids) == 6
    assert models.get(tiny_model(), [], {"tokenizer": tokenizer}) is model


def test_one_load_at_a_time(folders, monkeypatch):
    """transformers' loads change process-wide state: two at a time gave models of other dtypes, then some without
    weights."""
    running, most, load = [], [], ModelLoader.load

    def counted(self, *args, **options):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        try:
            return load(self, *args, **options)
        finally:
            running.pop()

    expected = [tokens(GenARM.from_pretrained(folder).generate("hi", PARAMS)) for folder in folders]
    monkeypatch.setattr(ModelLoader, "load", counted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda folder: tokens(functional.generate(folder, (), "hi", PARAMS)), folders * 2))
    assert found == expected * 2
    assert set(most) == {1}
    assert torch.get_default_dtype() == torch.float32


def test_tasks_that_wait_for_a_load_leave_the_loops_threads_free(tiny_model, tokenizer, monkeypatch):
    slow, go, load = build_model("llama", 4), threading.Event(), GenARM.from_pretrained.__func__
    given = {"arms": (), "prompts": "hi", "sampling_params": PARAMS, "tokenizer": tokenizer}
    expected = tokens(functional.generate(tiny_model(), **given))

    def held(cls, base, *args, **options):
        if base.config.bos_token_id == 7:
            assert go.wait(60)
        return load(cls, base, *args, **options)

    slow.config.bos_token_id = 7
    monkeypatch.setattr(GenARM, "from_pretrained", classmethod(held))

    async def main():
        waiting = [asyncio.create_task(functional.agenerate(slow, **given)) for _ in range(40)]
        await asyncio.sleep(0.1)
        try:
            assert await asyncio.wait_for(asyncio.to_thread(lambda: True), 10)
            found = await asyncio.wait_for(functional.agenerate(tiny_model(), **given), 20)
        finally:
            go.set()
        return found, await asyncio.gather(*waiting)

    found, others = run(main())
    assert tokens(found) == expected
    assert len({tuple(output.token_ids) for (output,) in others}) == 1
