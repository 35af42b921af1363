"""Inputs that are too large are refused by their size, before work or memory is spent; models refuse to be copied."""

from __future__ import annotations

import copy
import pickle

import pytest


def test_numbers_of_completions(model):
    assert len(model.prepare("the", n=1025)) == 1
    with pytest.raises(ValueError, match=r"prompts\[0\]: n=1000000000000: expected at most [0-9]+, for which there is"):
        model.prepare("the", n=10**12)


def test_completions_of_all_prompts_together(model, monkeypatch):
    """Each prompt's completions would fit alone, but not all together."""
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_AVPHYS_PAGES": 12_000, "SC_PAGE_SIZE": 4096}[name])
    size = 8192 + 64 * 128
    fits = 12_000 * 2048 // size
    assert len(model.prepare(["a"] * 3, n=fits // 3)) == 3
    with pytest.raises(
        ValueError, match=rf"prompts\[2\]: n={fits // 2}: expected at most {fits}, .*less those of other"
    ):
        model.prepare(["a"] * 3, n=fits // 2)
    assert len(model.prepare(["a"] * (fits + 1))) == fits + 1  # one completion per prompt is always allowed


def test_long_texts_cost_no_tokenising(model, monkeypatch):
    longest = max(map(len, model.tokenizer.get_vocab()))
    most = 2 * 256 * longest
    monkeypatch.setattr("genarm_fast.text.prompts.token_ids", lambda *_: pytest.fail("it is tokenised"))
    with pytest.raises(ValueError, match=rf"prompts\[0\]: {10**7} characters: expected at most {most}"):
        model.prepare("x" * 10**7)
    monkeypatch.undo()
    # A text that may fit by its characters is tokenised and its tokens are counted.
    with pytest.raises(ValueError, match="prompt tokens"):
        model.prepare("x" * most)


@pytest.mark.parametrize("copying", [pickle.dumps, copy.copy, copy.deepcopy])
def test_models_are_not_copied(model, copying):
    with pytest.raises(TypeError, match="GenARM: expected to be loaded anew in each process"):
        copying(model)
