"""Caches that grow under running sequences: the memory that growth takes at most, and the state after a failure
half-way."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch
from doubles import Lagging, engines_on
from tiny_models import build_model, save_adapter

from genarm_fast import GenARM, SamplingParams
from genarm_fast.models import kv_cache
from genarm_fast.speculation.config import OFF

SEEDED = {"max_new_tokens": 20, "ignore_eos": True, "seed": 1}
LONG, SHORT = list(range(20, 30)), [[3, 4, 5], [6, 7], [8, 9], [10, 11]]
# Keys and values of two layers, for both members in one forward or for each member.
TENSORS = {"lanes": 4, "members": 8}
DEVICES = pytest.mark.parametrize("device", [nullcontext, lambda: engines_on(Lagging())], ids=["cpu", "lagging"])


@pytest.fixture(params=["lanes", "members"])
def model(request, tmp_path, tokenizer):
    build_model("llama", 0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "lane", base=tmp_path / "base", seed=1)
    arm = tmp_path / "lane" if request.param == "lanes" else build_model("llama", 1)
    model = GenARM.from_pretrained(tmp_path / "base", arm, dtype=torch.float32, speculation="off")
    model.tensors = TENSORS[request.param]
    return model


@pytest.fixture
def memory(monkeypatch):
    """The bytes of all caches: "now", "most", and of the "largest" tensor. After `small` tensors, each further one
    raises the next of `errors`."""
    zeros, state = kv_cache.zeros, {"now": 0, "most": 0, "largest": 0, "made": 0, "small": 0, "errors": []}

    def gone(size):
        state["now"] -= size

    def counted(*inputs):
        state["made"] += 1
        if state["made"] > state["small"] and state["errors"] and (error := state["errors"].pop(0)):
            raise error
        tensor = zeros(*inputs)
        weakref.finalize(tensor, gone, tensor.nbytes)
        state["now"] += tensor.nbytes
        state["most"] = max(state["most"], state["now"])
        state["largest"] = max(state["largest"], tensor.nbytes)
        return tensor

    monkeypatch.setattr(kv_cache, "zeros", counted)
    return state


def begun(model):
    """Return an engine with a sequence under way, and its run."""
    (request,) = model.prepare([LONG], SamplingParams(**SEEDED))
    engine = model.engine()
    run = engine.run(request.sequences(model.tokenizer, OFF))
    next(run)
    return engine, run


def test_growing_takes_one_tensor_more(model, memory):
    expected = [output.token_ids for output in model.generate([LONG, *SHORT], **SEEDED)]
    model.release()
    assert memory["now"] == 0
    engine, run = begun(model)
    small = memory["now"]
    memory["most"] = memory["largest"] = 0
    outputs = model.generate(SHORT, **SEEDED)
    for _ in run:
        pass
    large = engine.workspace.bytes
    assert large >= 2 * small
    assert memory["now"] == large
    assert large < memory["most"] <= large + memory["largest"]
    assert memory["most"] < large + small  # the old and the new caches never exist at the same time
    assert [run.sequences[0].tokens, *(output.token_ids for output in outputs)] == expected


@DEVICES
def test_growth_that_fails_keeps_what_runs(model, memory, device):
    """Whichever tensor finds no memory, all tensors get their old size back, and the running sequences continue."""
    expected = [output.token_ids for output in model.generate([LONG, *SHORT], **SEEDED)]
    with device():
        for at in range(model.tensors):
            model.release()
            engine, run = begun(model)
            memory.update(made=0, small=at, errors=[torch.OutOfMemoryError("CUDA out of memory")])
            lost = engine.workspace.generation
            outputs = model.generate(SHORT, **SEEDED)
            for _ in run:
                pass
            assert not memory["errors"]
            assert engine.workspace.generation == lost
            assert [run.sequences[0].tokens, *(output.token_ids for output in outputs)] == expected


@DEVICES
def test_without_memory_to_go_back_all_is_prefilled_again(model, memory, device):
    expected = [output.token_ids for output in model.generate([LONG, *SHORT], **SEEDED)]
    with device():
        for at in (1, 2, 3):
            model.release()
            engine, run = begun(model)
            memory.update(made=0, small=at, errors=[torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
            lost = engine.workspace.generation
            outputs = model.generate(SHORT, **SEEDED)
            for _ in run:
                pass
            assert not memory["errors"]
            assert engine.workspace.generation > lost
            assert engine.workspace.is_intact
            assert [run.sequences[0].tokens, *(output.token_ids for output in outputs)] == expected


def test_an_interrupt_in_mid_growth(model, memory):
    """Ctrl-C comes between two tensors. Later answers never come from caches whose layers differ in size."""
    expected = [output.token_ids for output in model.generate([LONG, *SHORT], **SEEDED)]
    for at in range(model.tensors):
        model.release()
        _, run = begun(model)
        memory.update(made=0, small=at, errors=[KeyboardInterrupt()])
        with pytest.raises(KeyboardInterrupt):
            model.generate(SHORT, **SEEDED)
        for _ in run:
            pass
        assert not memory["errors"]
        assert run.sequences[0].error is not None or run.sequences[0].tokens == expected[0]
        _, run = begun(model)  # the run fits the size before; the caches grow under it once more
        outputs = model.generate(SHORT, **SEEDED)
        for _ in run:
            pass
        assert [run.sequences[0].tokens, *(output.token_ids for output in outputs)] == expected


def test_one_that_needs_all_memory_is_refused_and_the_others_end(model, memory, monkeypatch):
    """The request needs more than ever fits: the running sequences end, then it is refused by its size."""
    zeros = kv_cache.zeros
    expected = model.generate(LONG, **SEEDED)[0].token_ids
    model.release()
    engine, run = begun(model)
    most = engine.workspace.capacity

    def scarce(rows, *rest):
        if rows[2] > most:
            raise MemoryError
        return zeros(rows, *rest)

    monkeypatch.setattr(kv_cache, "zeros", scarce)
    with pytest.raises(Exception, match=rf"prompts\[0\]: {200 + 20} tokens take .* bytes of cache: out of memory"):
        model.generate([[5] * 200], **SEEDED)
    for _ in run:
        pass
    assert run.sequences[0].tokens == expected
