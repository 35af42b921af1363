"""What a profiler shows of a run: named ranges, each inside the range it is a part of."""

from __future__ import annotations

import asyncio

import pytest
import torch
from torch.autograd import profiler as legacy
from torch.profiler import ProfilerActivity, profile

from genarm_fast.device import base
from genarm_fast.speculation.config import Speculation

PARAMS = {"max_new_tokens": 8, "ignore_eos": True, "seed": 1}
INSIDE = {  # range: ranges that may directly enclose it
    "step": {None},
    "admit": {"step"},
    "allocate": {"admit"},
    "prefill": {"step"},
    "decode": {"step"},
    "draft": {"decode", "draft"},  # a whole draft, and the pieces of work that it launches
    "base.forward": {"decode"},
    "arm[0].forward": {"decode", "draft"},
    "arm[1].forward": {"decode"},
    "sample": {"decode"},
    "accept": {"decode"},
    "read-back": {"decode", "draft"},
    "deliver": {"step"},
}


def ranges(trace):
    """Return (name, name of the enclosing range) of all ranges in INSIDE, in order of time."""
    events = [event for event in trace.events() if event.name in INSIDE]
    events.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
    open_, found = [], []
    for event in events:
        while open_ and open_[-1].time_range.end <= event.time_range.start:
            open_.pop()
        found.append((event.name, open_[-1].name if open_ else None))
        open_.append(event)
    return found


def test_a_trace_names_the_parts_of_a_step(model):
    """The ranges of steps with drafts come in a sensible order."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        model.generate("the cat", **PARAMS, speculation=Speculation("a", 2))
    found = ranges(trace)
    assert {name for name, _ in found} >= set(INSIDE) - {"arm[1].forward"}
    assert {(name, around) for name, around in found if around not in INSIDE[name]} == set()
    names = [name for name, _ in found]
    first = names[: names.index("step", 1)]
    parts = ["step", "admit", "prefill", "decode", "draft", "base.forward", "sample", "accept", "read-back", "deliver"]
    assert sorted(parts, key=first.index) == parts
    steps = names.count("step")
    assert names.count("admit") == names.count("deliver") == steps


def test_a_trace_of_all_threads_shows_the_engine_thread(model):
    """The engine's steps run in a thread where no profiler was started."""
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=everywhere) as trace:
        asyncio.run(model.agenerate("the cat", **PARAMS))
    names = [name for name, _ in ranges(trace)]
    assert names.count("step") >= 8
    assert {"admit", "prefill", "decode", "sample", "accept", "read-back", "deliver"} <= set(names)


def test_nothing_is_recorded_without_a_profiler(model, monkeypatch):
    def fail(name):
        raise AssertionError(name)

    monkeypatch.setattr(legacy, "record_function", fail)
    monkeypatch.setattr(base, "annotate", fail)
    model.generate("the cat", **PARAMS)
    with profile(activities=[ProfilerActivity.CPU]), pytest.raises(AssertionError, match="step"):
        model.generate("the cat", **PARAMS)


def test_nvtx_under_nsight_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(base, "annotate", lambda name: seen.append(name) or base._nothing)
    for there in (False, True):
        monkeypatch.setattr(base, "NSIGHT", there)
        with base.span("forward"):
            pass
        assert seen == ["forward"] * there
