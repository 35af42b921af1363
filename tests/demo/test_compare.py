"""Comparisons: same seeds without and with guidance, advantages from the members' own log-probabilities."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from genarm_fast import GenARM, SamplingParams
from genarm_fast.demo.compare import Answer, Comparison, chat, compare, side_by_side, speed_table

PARAMS = SamplingParams(max_new_tokens=8, seed=3)


def test_compare(model: GenARM) -> None:
    prompts = ["the cat", "a man"]
    first, second = compare(model, {"positive": 2.0, "small": 1.0}, prompts, PARAMS)
    assert (first.arm, first.weight, second.arm, second.weight) == ("positive", 2.0, "small", 1.0)
    assert [answer.text for answer in first.base] == [answer.text for answer in second.base]
    for i, prompt in enumerate(prompts):
        base = model.generate(chat(prompt), PARAMS, seed=3 + i, weights=0)[0]
        guided = model.generate(chat(prompt), PARAMS, seed=3 + i, weights=[2.0, 0.0, 0.0], rewards=True)[0]
        assert (first.base[i].text, first.guided[i].text) == (base.text, guided.text)
        score = model.score(chat(prompt), guided.token_ids)[0]
        expected = [a - b for a, b in zip(guided.rewards["positive"].tokens, score.base_logprobs)]
        assert first.guided[i].advantages == pytest.approx(expected, abs=1e-4)
        assert len(first.guided[i].pieces) == len(guided.token_ids)
    assert min(first.base_speed, first.guided_speed) > 0


def shown(console: Console) -> str:
    answers = [Answer("good day", ["good", " day"], [3.0, -2.0], 0.44)]
    comparison = Comparison("positive", 1.5, ["Hello?"], answers, answers, 10.0, 5.0)
    console.print(side_by_side(comparison, console), speed_table([comparison]))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_shown_in_colour() -> None:
    text = shown(Console(file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor"))
    assert "\x1b[38;2;16;16;16;48;2;111;173;222mgood" in text
    assert "good +3.0" not in text


def test_shown_without_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe, and NO_COLOR on a terminal: the strongest tokens are spelt out."""
    monkeypatch.setenv("NO_COLOR", "1")
    piped = shown(Console(file=io.StringIO(), width=100))
    terminal = shown(Console(file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor"))
    for text in (piped, terminal):
        for part in ("Hello?", "guided by positive, weight 1.5", "+0.44", "good +3.0, day -2.0", "0.50 ×"):
            assert part in " ".join(text.replace("│", "").split()), part
    assert "\x1b" not in piped
    assert "48;2" not in terminal
