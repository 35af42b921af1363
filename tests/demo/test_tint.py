"""Colours grow with the advantage, and the pieces add up to the text."""

from __future__ import annotations

from typing import Any

import pytest

from genarm_fast.demo import tint


def test_style_grows_with_the_advantage() -> None:
    values = [0.3, 1.5, 3.0, 9.0]
    assert [tint.style(value)[-7:] for value in values] == list(tint.FAVOURED)
    assert [tint.style(-value)[-7:] for value in values] == list(tint.DISFAVOURED)
    assert tint.style(0.2) == tint.style(-0.2) == ""


def test_tint_colours_each_token() -> None:
    text = tint.tint(["good", " and ", "bad"], [5.0, 0.0, -5.0])
    assert text.plain == "good and bad"
    assert [(span.start, span.end, span.style) for span in text.spans if span.style] == [
        (0, 4, tint.style(5.0)),
        (9, 12, tint.style(-5.0)),
    ]


def test_extremes_names_the_strongest() -> None:
    pieces = [" fine", " dull", "\n", " great", " x", " ok"]
    assert (
        tint.extremes(pieces, [1.0, -3.0, -0.5, 4.0, 0.1, 0.3])
        == "great +4.0, fine +1.0, ok +0.3, dull -3.0, '\\n' -0.5"
    )
    assert tint.extremes(["a"], [0.1]) == ""


@pytest.mark.parametrize("text", ["the cat", "naïve 猫 🙂!", ""])
def test_pieces_spell_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    pieces = tint.token_pieces(tokenizer, [*ids, tokenizer.eos_token_id])
    assert len(pieces) == len(ids) + 1
    assert "".join(pieces) == text + tint.END


def test_unfinished_character_shows_nothing(tokenizer: Any) -> None:
    ids = tokenizer("a🙂")["input_ids"]
    assert "".join(tint.token_pieces(tokenizer, ids[:-1])) == "a"
