"""The same prompts and seeds, answered by the base alone and under guidance."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from genarm_fast.api import GenARM
from genarm_fast.demo.tint import extremes, tint, token_pieces
from genarm_fast.outputs import GenerationOutput, ScoreOutput
from genarm_fast.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with one ARM's opinion of each token: advantages[t] = log π_arm - log π_base, in nats."""

    text: str
    pieces: list[str]
    advantages: list[float]
    positivity: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The base's answers and the guided ones, same prompts and seeds. Speeds: tokens per second of the whole batch."""

    arm: str
    weight: float
    prompts: list[str]
    base: list[Answer]
    guided: list[Answer]
    base_speed: float
    guided_speed: float


class _Run(NamedTuple):
    outputs: list[GenerationOutput]
    scores: list[ScoreOutput]
    speed: float


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


@cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def positivity(text: str) -> float:
    """How positive a text sounds to VADER, a judge by word lists that no ARM has seen: -1 to 1."""
    return _vader().polarity_scores(text)["compound"]


def compare(
    model: GenARM, weights: Mapping[str, float], prompts: Sequence[str], params: SamplingParams
) -> list[Comparison]:
    """One comparison per ARM in `weights`, guided by it alone; prompt i is always sampled with seed params.seed + i."""
    chats = [chat(prompt) for prompt in prompts]

    def run(arm: str | None) -> _Run:
        only = tuple(weights[name] if name == arm else 0.0 for name in model.arm_names)
        requests = [params.override(seed=(params.seed or 0) + i, weights=only) for i in range(len(chats))]
        begin = time.perf_counter()
        outputs = model.generate(chats, requests)
        speed = sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - begin)
        return _Run(outputs, model.score(chats, [output.token_ids for output in outputs]), speed)

    base = run(None)
    comparisons = []
    for arm, weight in weights.items():
        guided = run(arm)
        before, after = _answers(model, base, arm), _answers(model, guided, arm)
        comparisons.append(Comparison(arm, weight, list(prompts), before, after, base.speed, guided.speed))
    return comparisons


def _answers(model: GenARM, run: _Run, arm: str) -> list[Answer]:
    answers = []
    for output, score in zip(run.outputs, run.scores):
        advantages = [reward - base for reward, base in zip(score.rewards[arm].tokens, score.base_logprobs)]
        pieces = token_pieces(model.tokenizer, output.token_ids)
        answers.append(Answer(output.text, pieces, advantages, positivity(output.text)))
    return answers


def side_by_side(comparison: Comparison, console: Console) -> Group:
    """A table per prompt: the base's answer on the left, the guided one on the right."""
    tables = []
    for prompt, base, guided in zip(comparison.prompts, comparison.base, comparison.guided):
        table = Table(title=Text(prompt, style="bold"), title_justify="left", expand=True, show_lines=True)
        table.add_column("base", ratio=1)
        table.add_column(f"guided by {comparison.arm}, weight {comparison.weight:g}", ratio=1)
        table.add_row(tint(base.pieces, base.advantages), tint(guided.pieces, guided.advantages))
        table.add_row(_summary(base, comparison.arm, console), _summary(guided, comparison.arm, console))
        tables.append(table)
    return Group(*tables)


def speed_table(comparisons: Sequence[Comparison]) -> Table:
    """Tokens per second without and with each ARM."""
    table = Table(box=None)
    table.add_column(f"batch of {len(comparisons[0].prompts)}")
    table.add_column("tokens per second", justify="right")
    table.add_column("of the base's", justify="right")
    for comparison in comparisons:
        ratio = comparison.guided_speed / comparison.base_speed
        if comparison is comparisons[0]:
            table.add_row("base", f"{comparison.base_speed:.1f}", "")
        table.add_row(f"guided by {comparison.arm}", f"{comparison.guided_speed:.1f}", f"{ratio:.2f} ×")
    return table


def _summary(answer: Answer, arm: str, console: Console) -> Text:
    text = f"positivity {answer.positivity:+.2f}, {arm} over base {sum(answer.advantages):+.1f} nats"
    colourless = console.color_system is None or console.no_color
    if colourless and (listed := extremes(answer.pieces, answer.advantages)):
        text += f" ({listed})"
    return Text(text, style="dim")
