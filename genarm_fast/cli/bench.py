"""`genarm-fast bench`: the cost of guidance on this machine, with the user's own models, before they are deployed."""

from __future__ import annotations

import argparse
import platform
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from genarm_fast import __version__
from genarm_fast.cli.display import console
from genarm_fast.cli.loading import add_format_arguments, add_loading_arguments, formatted, load
from genarm_fast.utils.jsonlines import dumps, located, read_objects

if TYPE_CHECKING:
    from genarm_fast.api import GenARM
    from genarm_fast.bench.runs import Drafts, Measured
    from genarm_fast.text.given import Prompt

QUESTIONS = (
    "Write a short review of the film that you saw last night.",
    "How do I keep a small vegetable garden alive during a hot summer?",
    "Explain to a child why the sky is blue.",
    "Give me some advice for my first day in a new job.",
    "Describe a walk through an old town in the early morning.",
    "What should I think about before I adopt a dog?",
    "Tell me how bread is made, from the grain to the loaf.",
    "What makes a good teacher?",
)
LABELS = {
    "hugging_face": "base, Hugging Face",
    "base": "base, this engine",
    "guided": "guided, no drafts",
    "guided_drafts": "guided, drafts (auto)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for batch sizes, rounds, prompts and models."""
    parser.add_argument(
        "--batch",
        type=_positive,
        nargs="+",
        default=[1, 8],
        metavar="N",
        help="sequences decoded together, each number by itself (default: 1 8)",
    )
    parser.add_argument("--new-tokens", type=_positive, default=64, metavar="N", help="per sequence (default: 64)")
    parser.add_argument(
        "--rounds", type=_positive, default=5, metavar="N", help="in each, every contender runs once (default: 5)"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="a prompt (default: eight questions in turn)")
    parser.add_argument(
        "-i", "--input", type=Path, metavar="FILE", help="JSON lines, whose `prompt`s are taken in turn; .gz too"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    add_loading_arguments(parser, generates=False, batches=False)
    add_format_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print a table, or JSON, of every batch size. Everything is checked before the first token."""
    if not args.arm:
        raise ValueError("--arm: expected at least one, whose cost is measured")
    for spec in args.arm:
        if spec.weight == 0:
            raise ValueError(f"--arm {spec.model}=0: expected another weight, since at 0 an ARM is not run")
    given = _prompts(args)
    args.max_batch_size = max(args.batch)
    model = load(args)
    from genarm_fast.bench.runs import CONTENDERS, measure

    prompts = []
    for line, prompt in given:
        with located(args.input, line) if args.input else nullcontext():
            prompts.append(formatted(args, model, prompt))
            model.prepare(prompts[-1:], max_new_tokens=args.new_tokens)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results = []
    terminal = console(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("", total=len(args.batch) * len(CONTENDERS) * (args.rounds + 1))
        for batch in args.batch:
            bar.update(task, description=f"batch {batch}")
            counts = {"batch": batch, "new_tokens": args.new_tokens, "rounds": args.rounds}
            results.append(measure(model, prompts, **counts, ran=lambda: bar.advance(task)))
    about = _about(args, model, len(prompts))
    if args.json:
        print(dumps({"about": about, "results": [asdict(each) for each in results]}))
    else:
        _show(console(), about, results)
    return 0


def _positive(text: str) -> int:
    try:
        if (number := int(text)) >= 1:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}: expected an integer >= 1")


def _prompts(args: argparse.Namespace) -> list[tuple[int, Prompt]]:
    """Return the prompts, each with its line number if it was read from a file, else with 0."""
    if args.prompt is not None and args.input:
        raise ValueError(f"--input {args.input}: expected no --prompt with it")
    if not args.input:
        return [(0, text) for text in (QUESTIONS if args.prompt is None else (args.prompt,))]
    prompts = []
    for line, row in read_objects(args.input):
        with located(args.input, line):
            if not isinstance(row.get("prompt"), (str, list)):
                raise ValueError(f"prompt={row.get('prompt')!r:.60}: expected text, chat messages or token ids")
        prompts.append((line, row["prompt"]))
    return prompts


def _about(args: argparse.Namespace, model: GenARM, prompts: int) -> dict[str, Any]:
    """Return a description of the models, machine and settings."""
    import torch
    import transformers

    from genarm_fast.engine.model_runner import in_one_forward
    from genarm_fast.kernels import _native

    forwards = [[model.members[i].name for i in group] for group in in_one_forward(model.members)]
    device = model.base.device
    return {
        "base": args.base,
        "arms": {arm.name: {"model": spec.model, "weight": arm.weight} for arm, spec in zip(model.arms, args.arm)},
        "forwards": forwards,
        "dtypes": {member.name: str(member.model.dtype).removeprefix("torch.") for member in model.members},
        "device": str(device),
        "processor": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "cpp_core": _native.core is not None,
        "threads": torch.get_num_threads(),
        "prompts": prompts,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "versions": {
            "genarm_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _show(out: Console, about: dict[str, Any], results: list[Measured]) -> None:
    for result in results:
        table = Table(title=f"batch {result.batch}", title_justify="left")  # fits into 80 columns
        table.add_column("contender", no_wrap=True)
        for title in ("tokens/s", "±", "ms/token", "x HF base", "x our base"):
            table.add_column(title, justify="right", no_wrap=True)
        for name, speed in result.tokens_per_second.items():
            ratios = (result.relative_to[other].get(name) for other in ("hugging_face", "base"))
            table.add_row(
                LABELS[name],
                f"{speed.median:.1f}",
                f"{result.spreads[name]:.0%}",
                f"{result.milliseconds_per_token[name]:.1f}",
                *("" if ratio is None else f"{ratio.median:.2f}" for ratio in ratios),
            )
        out.print(table)
        out.print(_drafts_line(result.drafts))
        if not result.trusted:
            out.print(f"too short to trust: {_doubt(about['rounds'], result)}", style="red")
    weights = ", ".join(f"{name}={arm['weight']:g}" for name, arm in about["arms"].items())
    forwards = "; ".join(" + ".join(names) + (" in one" if names[1:] else "") for names in about["forwards"])
    out.print(f"weights: {weights}; forwards: {forwards}")
    lengths = [length for result in results for length in result.prompt_tokens]
    out.print(
        f"medians of {about['rounds']} rounds, with the widest 90 % interval of each line; {results[0].clock} of whole "
        f"calls: {about['new_tokens']} new tokens at T = 1 after prompts of {min(lengths)} to {max(lengths)}"
    )
    dtypes = ", ".join(sorted(set(about["dtypes"].values())))
    threads = f"{about['threads']} thread{'s' * (about['threads'] != 1)}"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    core = "" if about["cpp_core"] or about["device"] != "cpu" else "WITHOUT THE C++ CORE (see docs/kernels.md), "
    out.print(f"{about['device']} ({about['processor']}), {core}{threads}, {dtypes}; {versions}")


def _drafts_line(drafts: Drafts) -> str:
    """Return a sentence: who drafted, what the drafts were worth, and whether they changed a text."""
    turns: Counter[str] = Counter()
    for choice, count in drafts.chosen.items():
        turns[choice.rpartition(", k=")[0]] += count
    nobody = turns.pop("", 0)
    what = f"drafts: none in {nobody} steps, since they would not pay"
    if turns:
        right = f"{drafts.drafted}, {drafts.accepted / drafts.drafted:.0%} right" if drafts.drafted else "none"
        whose = ", ".join(f"{name} {count}" for name, count in [*turns.most_common(), ("nobody", nobody)])
        what = f"drafts: {right}; whose turn it was: {whose}; {drafts.tokens_per_step:.2f} tokens a step and text"
    if drafts.same_texts == drafts.texts:
        return f"{what}; all {drafts.texts} texts are the same tokens with drafts as without"
    changed = drafts.texts - drafts.same_texts
    return f"{what}; WITH DRAFTS {changed} of {drafts.texts} texts are other tokens than without: rounding, or a fault"


def _doubt(rounds: int, result: Measured) -> str:
    from genarm_fast.bench.runs import MAX_TRUSTED_SPREAD
    from genarm_fast.bench.timing import LEAST_ROUNDS

    if rounds < LEAST_ROUNDS:
        return f"{rounds} round{'s' * (rounds != 1)}, expected at least {LEAST_ROUNDS} (--rounds)"
    wide = ", ".join(
        f"{LABELS[name]} ± {spread:.1%}" for name, spread in result.spreads.items() if spread > MAX_TRUSTED_SPREAD
    )
    return f"{wide}, expected at most {MAX_TRUSTED_SPREAD:.0%} (more --rounds, --new-tokens)"
