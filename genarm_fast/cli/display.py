"""Reports about generated or scored text, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from genarm_fast.outputs import ArmRewards, Completion, GenerationOutput


def console(*, stderr: bool = False) -> Console:
    """Return a console that prints text as it is: [brackets] and :colons: in ids, names and texts mean nothing."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def show_report(out: Console, output: GenerationOutput, tokenizer: Any) -> None:
    """Show log-probabilities and rewards if asked for. On a terminal, show speed, finish reasons and seeds too."""
    if out.is_terminal:
        ends = ", ".join(f"{each.finish_reason} (seed {each.seed})" for each in output.completions)
        tokens, speed = output.usage.completion_tokens, output.timing.tokens_per_second
        out.print(f"{tokens} token{'s' * (tokens != 1)}, {speed:.1f} tokens/s; {ends}", style="dim")
    for completion in output.completions:
        if completion.logprobs is not None:
            out.print(token_table(tokenizer, completion.token_ids, _logprob_columns(completion, tokenizer)))
        if completion.rewards:
            out.print(reward_table(completion.rewards))


def reward_table(rewards: Mapping[str, ArmRewards]) -> Table:
    """Return a table with one line for each ARM: the sum of log π_arm over the tokens, and the mean."""
    table = Table("ARM", title="rewards, log π_arm in nats", title_justify="left")
    table.add_column("total", justify="right")
    table.add_column("per token", justify="right")
    for name, reward in rewards.items():
        table.add_row(name, f"{reward.total:.2f}", f"{reward.total / max(1, len(reward.tokens)):.3f}")
    return table


def token_table(tokenizer: Any, token_ids: Sequence[int], columns: Mapping[str, Sequence[float | str]]) -> Table:
    """Return a table with one line for each token: its text, then a value from each column."""
    table = Table("token")
    for name, values in columns.items():
        table.add_column(name, justify="left" if values and isinstance(values[0], str) else "right")
    for token, *values in zip(token_ids, *columns.values()):
        cells = [value if isinstance(value, str) else f"{value:.2f}" for value in values]
        table.add_row(_piece(tokenizer, token), *cells)
    return table


def _logprob_columns(completion: Completion, tokenizer: Any) -> dict[str, Sequence[float | str]]:
    entries = completion.logprobs or []
    columns: dict[str, Sequence[float | str]] = {"log p": [entry.logprob for entry in entries]}
    if any(entry.top for entry in entries):
        columns["most probable"] = [
            "  ".join(f"{_piece(tokenizer, token)} {value:.2f}" for token, value in entry.top.items())
            for entry in entries
        ]
    return columns | {name: reward.tokens for name, reward in (completion.rewards or {}).items()}


def _piece(tokenizer: Any, token: int) -> str:
    """Return a token's own text, with spaces and line ends visible."""
    return repr(tokenizer.decode([token]))[1:-1].replace(" ", "·")
