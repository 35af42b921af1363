"""The host's work per token does not grow with the text. The tests count it in list elements read and functions called,
and measure no times."""

from __future__ import annotations

import gc
import statistics
import sys

import pytest
from cuda_driver import FakeGraph, OnCpuTensors, cuda_driver
from doubles import engines_on
from tiny_models import build_model

from genarm_fast import GenARM, SamplingParams
from genarm_fast.engine import penalties
from genarm_fast.engine.engine import Engine
from genarm_fast.speculation.config import OFF, Speculation
from genarm_fast.text import detokenize

PARAMS = SamplingParams(max_new_tokens=100, ignore_eos=True, seed=1)


class Counted(list):
    """A list that counts how many of its elements are read."""

    read = 0

    def __iter__(self):
        Counted.read += len(self)
        return super().__iter__()

    def __getitem__(self, index):
        found = super().__getitem__(index)
        Counted.read += len(found) if isinstance(index, slice) else 1
        return found


def unchanged(input_ids, scores):
    assert input_ids.shape[0] == 1
    return scores


CASES = {
    "plain": {},
    "stop strings": {"stop": ["never", "abc"]},
    "log-probabilities": {"logprobs": 2, "rewards": True},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.1},
    "processors": {"logits_processors": [unchanged, unchanged]},
    "n-grams": {"speculation": Speculation("ngram", 3)},
    "an ARM's drafts": {"speculation": Speculation("a", 2)},
}


def work(model, **options):
    """Return how many elements are read per token of each chunk of a stream, keyed by the number of tokens before the
    chunk."""
    found = {}
    with model.stream([5, 6, 7], PARAMS, **options) as stream:
        (sequence,) = stream._sequences
        for name in ("tokens", "used_weights", "logprobs", "rewards"):
            setattr(sequence, name, Counted(getattr(sequence, name)))
        sequence._detokenizer.ids = Counted()
        length = 0
        while length < 95:
            before = Counted.read
            chunk = next(stream)
            found[length] = (Counted.read - before) / len(chunk.token_ids)
            length += len(chunk.token_ids)
    return found


@pytest.mark.parametrize("case", CASES)
def test_work_for_a_token_does_not_grow(model, monkeypatch, case):
    decoded, decoder = [], detokenize.decoder

    def counted(*args, **options):
        decode = decoder(*args, **options)
        return lambda ids: decoded.append(len(ids)) or decode(ids)

    monkeypatch.setattr(detokenize, "decoder", counted)
    found = work(model, **CASES[case])
    early = max(count for length, count in found.items() if length < 40)
    late = max(count for length, count in found.items() if length >= 60)
    assert late <= 1.5 * early + 8
    assert max(decoded) < 40  # a text of bytes that form no character is held back for some tokens


def test_a_growing_read_is_noticed(model, monkeypatch):
    """This is the control: a processor gets a list that is rebuilt for each token."""
    ids = penalties.SeenTokens.ids

    def rebuilt(self, sequence, drafted, device):
        list(sequence.tokens)
        return ids(self, sequence, drafted, device)

    monkeypatch.setattr(penalties.SeenTokens, "ids", rebuilt)
    found = work(model, **CASES["processors"])
    assert found[90] > 1.5 * max(count for length, count in found.items() if length < 40) + 8


def test_processors_see_all_tokens_so_far(model):
    """A processor sees all tokens so far, and what it does to its input affects no other processor."""
    seen = []

    def spoiling(input_ids, scores):
        seen.append(input_ids[0].tolist())
        input_ids.zero_()
        return scores

    params = {"max_new_tokens": 12, "logits_processors": [spoiling, spoiling]}
    for speculation in ("off", Speculation("a", 2)):
        seen.clear()
        (output,) = model.generate([5, 6, 7], PARAMS, speculation=speculation, **params)
        whole = [5, 6, 7, *output.token_ids]
        assert [ids for ids in seen if len(ids) < 15][::2] == [ids for ids in seen if len(ids) < 15][1::2]
        assert all(ids == whole[: len(ids)] for ids in seen)
        assert {len(ids) for ids in seen} == set(range(3, 15))


def garbage_of(model, tokens):
    """Return the number of objects in reference circles that a generation leaves behind."""
    gc.collect()
    gc.disable()
    try:
        model.generate([5, 6, 7], PARAMS, max_new_tokens=tokens)
        return gc.collect()
    finally:
        gc.enable()


def test_tokens_leave_no_circles_behind(model):
    """The garbage collector then has nothing to do, however long the text is."""
    garbage_of(model, 10)
    assert garbage_of(model, 60) <= garbage_of(model, 10) + 20


def calls_of_a_step(monkeypatch, tokenizer, rows, plan):
    """Return the number of Python and C functions called in a step of `rows` sequences, where a step is one graph."""
    model = GenARM.from_pretrained(build_model("llama", 0), build_model("llama", 1), tokenizer=tokenizer)
    counts, step = [], Engine._step

    def counted(engine):
        counts.append(0)

        def count(_frame, event, _function):
            counts[-1] += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            return step(engine)
        finally:
            sys.setprofile(None)

    with cuda_driver(), engines_on(OnCpuTensors()), monkeypatch.context() as patch:
        patch.setattr(Engine, "_step", counted)
        patch.setattr(FakeGraph, "replay", lambda _: None)
        model.generate([[5, 6, 7]] * rows, PARAMS.override(max_new_tokens=30), speculation=plan)
    return statistics.median(counts[15:-2])  # the steps before run in pieces or are captured


STEP, ROW = 420, 50  # limits in calls; a step needs 360 to 380, a sequence 34 to 44 (Python 3.11)


@pytest.mark.parametrize("plan", [OFF, Speculation("arm", 4), Speculation("ngram", 4)], ids=["plain", "arm", "text"])
def test_a_step_calls_few_functions(monkeypatch, tokenizer, plan):
    """The host's work was once 465 calls per step, and 92 more for each further sequence."""
    one, eight = (calls_of_a_step(monkeypatch, tokenizer, rows, plan) for rows in (1, 8))
    assert one <= STEP
    assert (eight - one) / 7 <= ROW


def test_more_work_for_each_sequence_is_noticed(monkeypatch, tokenizer):
    """This is the control: ten more look-ups of each sequence's position."""
    deliver = Engine._deliver

    def slower(self, advanced):
        for sequence in advanced * 10:
            sequence.position(0)
        deliver(self, advanced)

    monkeypatch.setattr(Engine, "_deliver", slower)
    one, eight = (calls_of_a_step(monkeypatch, tokenizer, rows, OFF) for rows in (1, 8))
    assert (eight - one) / 7 > ROW
