"""The same prompts and seeds, answered by the base alone and under the guidance of one ARM or another."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from genarm_fast.api import GenARM
from genarm_fast.demo.tint import extremes, tint, token_pieces
from genarm_fast.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, with the advantage of each token by the judging ARM: log π_arm - log π_base, in nats."""

    text: str
    pieces: list[str]
    advantages: list[float]
    positivity: float


@dataclass(frozen=True, slots=True)
class Run:
    """Answers to all prompts, decoded as one batch, guided by one ARM, or by none (arm None)."""

    arm: str | None
    weight: float
    answers: list[Answer]
    tokens_per_second: float


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


@cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def positivity(text: str) -> float:
    """Return how positive a text sounds to VADER, -1 to 1. VADER judges by word lists, which no ARM has seen."""
    return _vader().polarity_scores(text)["compound"]


def compare(
    model: GenARM, guides: Mapping[str, float], judge: str, prompts: Sequence[str], params: SamplingParams
) -> list[Run]:
    """Return the base's run, then one for each ARM in `guides` at its weight. Prompt i has seed params.seed + i.

    The advantages are those of the ARM called `judge` in every run, so that runs can be compared.
    """
    chats = [chat(prompt) for prompt in prompts]
    runs = []
    for arm, weight in [(None, 0.0), *guides.items()]:
        weights = tuple(weight if name == arm else 0.0 for name in model.arm_names)
        requests = [params.override(seed=(params.seed or 0) + i, weights=weights) for i in range(len(chats))]
        begin = time.perf_counter()
        outputs = model.generate(chats, requests)
        seconds = time.perf_counter() - begin
        answers = []
        for output, score in zip(outputs, model.score(chats, [output.token_ids for output in outputs])):
            advantages = [reward - base for reward, base in zip(score.rewards[judge].tokens, score.base_logprobs)]
            pieces = token_pieces(model.tokenizer, output.token_ids)
            answers.append(Answer(output.text, pieces, advantages, positivity(output.text)))
        runs.append(Run(arm, weight, answers, sum(len(output.token_ids) for output in outputs) / seconds))
    return runs


def side_by_side(runs: Sequence[Run], judge: str, prompts: Sequence[str], console: Console) -> Group:
    """Return a table for each prompt, with a column for each run."""
    tables = []
    for i, prompt in enumerate(prompts):
        table = Table(title=Text(prompt, style="bold"), title_justify="left", expand=True, show_lines=True)
        for run in runs:
            table.add_column(_label(run), ratio=1)
        table.add_row(*(tint(run.answers[i].pieces, run.answers[i].advantages) for run in runs))
        table.add_row(*(_summary(run.answers[i], judge, console) for run in runs))
        tables.append(table)
    return Group(*tables)


def speed_table(runs: Sequence[Run]) -> Table:
    """Return a table of tokens per second of each run, also relative to the first run."""
    table = Table(box=None)
    table.add_column(f"batch of {len(runs[0].answers)}")
    table.add_column("tokens per second", justify="right")
    table.add_column("of the base's", justify="right")
    for run in runs:
        ratio = run.tokens_per_second / runs[0].tokens_per_second
        table.add_row(_label(run), f"{run.tokens_per_second:.1f}", f"{ratio:.2f} ×")
    return table


def _label(run: Run) -> str:
    return "base" if run.arm is None else f"guided by {run.arm}, weight {run.weight:g}"


def _summary(answer: Answer, judge: str, console: Console) -> Text:
    text = f"positivity {answer.positivity:+.2f}, {judge} over base {sum(answer.advantages):+.1f} nats"
    colourless = (console.color_system is None or console.no_color) and not console.record
    if colourless and (listed := extremes(answer.pieces, answer.advantages)):
        text += f" ({listed})"
    return Text(text, style="dim")
