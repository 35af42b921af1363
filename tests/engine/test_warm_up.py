"""After `warm_up`, a request runs no check, makes no caches and captures nothing."""

from __future__ import annotations

import gc
import random
from collections import Counter
from unittest.mock import patch

import pytest
import torch
from against_reference import random_prompts
from cuda_driver import OnCpuTensors, cuda_driver
from doubles import engines_on
from tiny_models import build_model

from genarm_fast import GenARM, SamplingParams
from genarm_fast.engine import selfcheck
from genarm_fast.engine.model_runner import ModelRunner
from genarm_fast.engine.warm_up import EngineBusy
from genarm_fast.models.kv_cache import RaggedLayer
from genarm_fast.speculation.config import Speculation
from genarm_fast.speculation.observations import PLAIN
from genarm_fast.speculation.tuner import Tuner

PARAMS = SamplingParams(max_new_tokens=24, seed=1, ignore_eos=True)
LENGTHS = {"prompt_tokens": 40, "max_new_tokens": 24}  # 64 in all, and caches have multiples of 64


@pytest.fixture
def fresh(tokenizer):
    """A function that returns a new GenARM at each call. No earlier test has checked its models."""
    models = build_model("llama", 0), build_model("llama", 1)
    return lambda **options: GenARM.from_pretrained(*models, tokenizer=tokenizer, max_batch_size=4, **options)


@pytest.fixture
def work(monkeypatch):
    """Counts of things made or checked, by the name of the function."""
    counts: Counter[str] = Counter()

    def count(owner, name):
        function = getattr(owner, name)

        def counted(*args):
            counts[name] += 1
            return function(*args)

        monkeypatch.setattr(owner, name, counted)

    for owner, name in ((ModelRunner, "reserve"), (RaggedLayer, "allocate"), (selfcheck, "deviations")):
        count(owner, name)
    return counts


def requests(model, longest=40, most=3, **options):
    """Decode requests of every batch size up to `most`, with short prompts and one of the longest; return their
    tokens."""
    found = []
    for count in range(1, most + 1):
        prompts = [*random_prompts(random.Random(count), count - 1, 30), [5] * longest]
        found.append([output.token_ids for output in model.generate(prompts, PARAMS, **options)])
    return found


def test_the_collector_has_looked_at_what_was_loaded(fresh):
    """A full collection after loading takes 0.4 s, because loaded objects count as old; `warm_up` does it
    beforehand."""
    model = fresh()
    before = gc.get_stats()[2]["collections"]
    model.warm_up()
    assert gc.get_stats()[2]["collections"] > before


@pytest.mark.parametrize("speculation", ["off", "auto", Speculation("arm", 3), Speculation("ngram", 2)])
def test_no_request_makes_anything(fresh, work, speculation):
    cold = fresh()
    assert work.pop("deviations") > 0
    expected = requests(cold)
    assert min(work[name] for name in ("reserve", "allocate")) > 0
    assert not work["deviations"]  # neither engine checks again
    model = fresh()
    model.warm_up(batch_sizes=[3, 1], **LENGTHS, speculation=speculation)
    before = work.copy()
    assert requests(model, speculation=speculation) == expected
    assert work == before
    model.generate([5] * 120, PARAMS)  # longer than announced to `warm_up`
    assert work != before


def test_at_load(fresh, work):
    model = fresh(warm_up=True)
    before = work.copy()
    assert before["deviations"] > 0
    model.generate([5] * 100, max_new_tokens=100)
    assert work == before


def test_caches_are_kept_though_they_are_larger_than_the_weights(fresh, work, monkeypatch):
    monkeypatch.setattr("genarm_fast.engine.workspace.MIN_KEPT_BYTES", 0)
    model = fresh()
    model.warm_up(batch_sizes=3, prompt_tokens=100, max_new_tokens=150)
    workspace = model.engine().workspace
    assert workspace.bytes > workspace.kept_bytes_limit
    before = work.copy()
    model.generate([[5], [6]], PARAMS)
    assert work == before
    assert workspace.bytes == workspace.warm_up_bytes > workspace.kept_bytes_limit
    model.generate([[5] * 20 for _ in range(4)], max_new_tokens=200)  # more memory than that is not kept
    assert workspace.bytes == 0


def test_every_page_of_the_caches_is_written_to(fresh, monkeypatch):
    allocate = RaggedLayer.allocate

    def untouched(layer, entry):
        allocate(layer, entry)
        layer.keys.fill_(7.0)
        layer.values.fill_(7.0)

    monkeypatch.setattr(RaggedLayer, "allocate", untouched)
    model = fresh()
    model.warm_up(batch_sizes=2)
    states = [each for runner in model.engine().executor.runners for each in runner._states()]
    assert len(states) == 8
    assert not any(each.count_nonzero() for each in states)


def test_the_tuner_learns_times_and_no_acceptance(fresh):
    """The time of a step does not depend on the text, but random tokens say nothing about acceptance."""
    model = fresh(speculation="auto")
    model.warm_up(batch_sizes=[3, 1])
    (stats,) = model.tuners.stats()
    assert not stats["steps"]
    assert not any(sum(each["drafted"]) for each in stats["drafters"].values())
    assert {"1", "3"} <= {f"{float(rows):.0f}" for rows in stats["plain_seconds"]}
    (arm,) = (each for name, each in stats["drafters"].items() if "arm" in name)
    tokens = {round(float(size)) for size in arm["verify_seconds"]}  # rows · (K + 1), to within 12 %
    assert all(min(abs(size - each) / each for size in tokens) < 0.13 for each in (2, 5, 6, 15))
    assert arm["draft_seconds"]


@pytest.mark.parametrize("warm", [True, False])
def test_the_first_request_measures_no_plain_steps(fresh, warm):
    """Without `warm_up` two plain steps come first. With it, the first step already tells whether drafts are right."""
    model = fresh(speculation="auto")
    if warm:
        model.warm_up(batch_sizes=1, **LENGTHS)
    chosen = []
    (tuner,) = model.tuners._tuners.values() if warm else [None]
    choose = Tuner.choose

    def choosing(self, rows):
        chosen.append(choose(self, rows))
        return chosen[-1]

    with patch.object(Tuner, "choose", choosing):
        model.generate([5, 6, 7], PARAMS)
    assert (chosen[0] != PLAIN) if warm else (chosen[:2] == [PLAIN, PLAIN])
    (now,) = model.tuners._tuners.values()
    assert now.steps.total() == len(chosen)
    assert tuner in (None, now)
    assert sum(sum(each.drafted) for each in now.drafters) > 0


def test_acceptance_learnt_before_is_kept(fresh):
    model = fresh(speculation="auto")
    model.generate([5, 6, 7], PARAMS)
    (before,) = model.tuners.stats()
    model.warm_up(batch_sizes=1, **LENGTHS)
    (after,) = model.tuners.stats()
    assert after["steps"] == before["steps"]
    for name, each in before["drafters"].items():
        assert after["drafters"][name]["drafted"] == each["drafted"]
        assert len(after["drafters"][name]["verify_seconds"]) >= len(each["verify_seconds"])


@pytest.mark.parametrize("speculation", ["off", Speculation("arm", 2), Speculation(max_k=3)])
def test_no_request_captures_anything_on_cuda(fresh, work, monkeypatch, speculation):
    """This holds also for more graphs than are kept otherwise."""
    monkeypatch.setattr("genarm_fast.device.cuda.MOST_GRAPHS", 4)
    expected = requests(fresh(), longest=120)
    model = fresh()
    with cuda_driver() as log, engines_on(OnCpuTensors()) as device:
        model.warm_up(batch_sizes=3, prompt_tokens=120, max_new_tokens=24, speculation=speculation)
        captures, calls, before = len(log.of("capture")), device.calls.copy(), work.copy()
        assert captures >= 3 * 2 * 2 > 4  # rows, lengths, members
        assert requests(model, longest=120, speculation=speculation) == expected
        assert len(log.of("capture")) == captures == len(device.graphs)
        assert device.calls == calls
        assert work == before
        assert log.of("replay")


def test_a_draft_model_on_cuda(tokenizer):
    models = [build_model("llama", seed) for seed in range(3)]
    options = {"tokenizer": tokenizer, "max_batch_size": 4, "draft_model": models[2]}
    model = GenARM.from_pretrained(*models[:2], **options)
    with cuda_driver() as log, engines_on(OnCpuTensors()) as device:
        plan = Speculation("draft_model", 2)
        model.warm_up(batch_sizes=2, **LENGTHS, speculation=plan)
        captures = len(log.of("capture"))
        # For 1 and 2 rows: forwards, of a draft model for one token only; plain steps and steps with two drafts. Also
        # one plain step with filters and log-probs.
        # step with filters and log-probs.
        assert captures == 2 * (2 * 3 + 1) + 2 * 2 + 1
        requests(model, most=2, speculation=plan)
        assert len(log.of("capture")) == captures == len(device.graphs)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_sizes": 5}, ValueError, r"batch_sizes=5: expected integers in 1\.\.4, which is max_batch_size"),
        ({"batch_sizes": [1, 2.5]}, TypeError, r"batch_sizes=2.5: expected integers in 1\.\.4"),
        ({"batch_sizes": []}, ValueError, r"batch_sizes=\[\]: expected .*, at least one"),
        ({"prompt_tokens": 0}, ValueError, "prompt_tokens=0: expected None or an integer >= 1"),
        ({"max_new_tokens": "9"}, TypeError, "max_new_tokens='9': expected None or an integer >= 1"),
        ({"prompt_tokens": 200, "max_new_tokens": 57}, ValueError, "expected at most 256 tokens, the context"),
        ({"speculation": "on"}, ValueError, "speculation='on': expected"),
    ],
)
def test_refused_before_any_work(fresh, work, arguments, error, message):
    model, before = fresh(), work.copy()
    with pytest.raises(error, match=message):
        model.warm_up(**arguments)
    assert work == before


def test_other_refusals(fresh, monkeypatch):
    with pytest.raises(TypeError, match="warm_up=1: expected True or False"):
        fresh(warm_up=1)
    model = fresh(cache_bytes=100_000)
    with pytest.raises(MemoryError, match=r"4 x 256 tokens take .* of cache: expected at most cache_bytes=100,000"):
        model.warm_up(batch_sizes=4)
    model.cache_bytes = None
    expected = model.generate([5, 6], PARAMS)[0].token_ids
    with model.stream([5, 6], PARAMS) as stream:
        next(stream)
        with pytest.raises(RuntimeError, match="warm_up: expected no requests that are running"):
            model.warm_up(batch_sizes=4)
        for _ in stream:
            pass
    assert stream.output.token_ids == expected
    model.warm_up(batch_sizes=4)
    monkeypatch.setattr(selfcheck, "deviations", lambda members, *_: [9.0] * len(members))
    with pytest.raises(ValueError, match="does not give the same logits over a static cache"):
        fresh().warm_up()


def test_narrow_contexts(tiny_model, tokenizer):
    model = GenARM.from_pretrained(tiny_model(max_position_embeddings=16), tokenizer=tokenizer, warm_up=True)
    assert len(model.generate([5] * 8, max_new_tokens=8, ignore_eos=True)[0].token_ids) == 8
    assert torch.is_inference_mode_enabled() is False


def test_contexts_without_a_bound_and_of_one_token(tiny_model, tokenizer, monkeypatch):
    model = GenARM.from_pretrained(tiny_model(max_position_embeddings=512), tokenizer=tokenizer)
    monkeypatch.setattr(model.base, "context", 1)
    with pytest.raises(ValueError, match="context=1: expected 2 tokens"):
        model.warm_up()
    monkeypatch.setattr(model.base, "context", None)
    model.warm_up()
    assert model.engine().workspace.capacity >= 256
    model.warm_up(prompt_tokens=300, max_new_tokens=100)
    assert model.engine().workspace.capacity >= 400


def test_it_leaves_requests_alone_that_wait(fresh):
    model = fresh()
    (waiting,) = model.engine().add(model.prepare([5, 6], PARAMS)[0])
    with pytest.raises(EngineBusy, match="expected no requests that are running"):
        model.warm_up()
    assert not waiting.tokens
    model.engine().abort([waiting])
    model.warm_up()
