"""`genarm-fast score`: rewards of given responses, and on preference pairs the accuracy of each ARM."""

from __future__ import annotations

import argparse
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.table import Table

from genarm_fast.cli.display import console, reward_table, token_table
from genarm_fast.cli.loading import add_format_arguments, add_loading_arguments, formatted
from genarm_fast.cli.process import input_path
from genarm_fast.cli.scoring import load_to_score, score_all
from genarm_fast.utils.jsonlines import dumps, located, read_objects
from genarm_fast.utils.pipes import copied, is_pipe

EXPECTED = (("prompt", (str, list), "text, chat messages or token ids"), ("response", str, "text"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the responses to score and the models."""
    parser.add_argument("--prompt", metavar="TEXT", help="a prompt, with --response")
    parser.add_argument("--response", metavar="TEXT", help="the response to score")
    parser.add_argument(
        "-i",
        "--input",
        type=Path,
        metavar="FILE",
        help="JSON lines (.gz too; -: stdin): prompt and response, or preference pairs as for training",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    add_loading_arguments(parser, generates=False)
    add_format_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Score one response, a file of responses, or a file of pairs."""
    given = [name for name in ("prompt", "response", "input") if getattr(args, name) is not None]
    if given == ["prompt", "response"]:
        return _one(args)
    if given != ["input"]:
        raise ValueError("expected --prompt and --response, or --input alone")
    args.input = input_path(args.input)
    with ExitStack() as held:
        if is_pipe(args.input):  # the input is read twice
            args.input = Path(held.enter_context(copied(args.input)).name)
        _, first = next(read_objects(args.input))
        if "response" in first:
            return _responses(args)
        from genarm_fast.cli.pairs import score_pairs  # imports torch and transformers

        return score_pairs(args)


def _one(args: argparse.Namespace) -> int:
    model = load_to_score(args)
    (output,) = model.score([formatted(args, model, args.prompt)], [args.response])
    if args.json:
        print(dumps(output.to_dict()))
        return 0
    columns = {"(base)": output.base_logprobs, **{name: reward.tokens for name, reward in output.rewards.items()}}
    out = console()
    out.print(token_table(model.tokenizer, output.token_ids, columns))
    out.print(reward_table(output.rewards))
    return 0


def _responses(args: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for line, row in read_objects(args.input):
        with located(args.input, line):
            for name, kinds, expected in EXPECTED:
                if not isinstance(row.get(name), kinds):
                    raise ValueError(f"{name}={row.get(name)!r:.60}: expected {expected}")
        rows.append({"id": line, **row})
        lines.append(line)
    model = load_to_score(args)
    prompts = []
    for line, row in zip(lines, rows):
        with located(args.input, line):
            prompts.append(formatted(args, model, row["prompt"]))
    outputs = score_all(model, args.input, lines, prompts, [row["response"] for row in rows])
    if args.json:
        print(dumps({"scores": [{"id": row["id"], **output.to_dict()} for row, output in zip(rows, outputs)]}))
        return 0
    table = Table("id", "response")
    for title in ("tokens", "(base)", *model.arm_names):
        table.add_column(title, justify="right")
    for row, output in zip(rows, outputs):
        totals = [math.fsum(output.base_logprobs), *(reward.total for reward in output.rewards.values())]
        excerpt = " ".join(row["response"].split())[:60]
        table.add_row(str(row["id"]), excerpt, str(len(output.token_ids)), *(f"{total:.2f}" for total in totals))
    console().print(table)
    return 0
