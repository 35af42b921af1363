"""Comparisons: the same seeds without and with guidance, advantages from the members' own log-probabilities."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from genarm_fast import GenARM, SamplingParams
from genarm_fast.demo.compare import Answer, Run, chat, compare, side_by_side, speed_table

PARAMS = SamplingParams(max_new_tokens=8, seed=3)


def test_compare(model: GenARM) -> None:
    prompts = ["the cat", "a man"]
    runs = compare(model, {"positive": 2.0, "small": 1.0}, "concise", prompts, PARAMS)
    assert [(run.arm, run.weight) for run in runs] == [(None, 0.0), ("positive", 2.0), ("small", 1.0)]
    for run, weights in zip(runs, ([0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0])):
        assert run.tokens_per_second > 0
        for i, prompt in enumerate(prompts):
            output = model.generate(chat(prompt), PARAMS, seed=3 + i, weights=weights, rewards=True)[0]
            assert run.answers[i].text == output.text
            score = model.score(chat(prompt), output.token_ids)[0]
            expected = [arm - base for arm, base in zip(output.rewards["concise"].tokens, score.base_logprobs)]
            assert run.answers[i].advantages == pytest.approx(expected, abs=1e-4)
            assert len(run.answers[i].pieces) == len(output.token_ids)


def shown(console: Console) -> str:
    answers = [Answer("good day", ["good", " day"], [3.0, -2.0], 0.44)]
    runs = [Run(None, 0.0, answers, 10.0), Run("positive", 1.5, answers, 5.0)]
    console.print(side_by_side(runs, "positive", ["Hello?"], console), speed_table(runs))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_shown_in_colour() -> None:
    text = shown(Console(file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor"))
    assert "\x1b[38;2;16;16;16;48;2;111;173;222mgood" in text
    assert "good +3.0" not in text


def test_shown_without_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pipe, or with NO_COLOR on a terminal, the strongest tokens are listed in words."""
    monkeypatch.setenv("NO_COLOR", "1")
    piped = shown(Console(file=io.StringIO(), width=100))
    terminal = shown(Console(file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor"))
    for text in (piped, terminal):
        for part in ("Hello?", "guided by positive, weight 1.5", "+0.44", "good +3.0, day -2.0", "0.50 ×"):
            assert part in " ".join(text.replace("│", "").split()), part
    assert "\x1b" not in piped
    assert "48;2" not in terminal
