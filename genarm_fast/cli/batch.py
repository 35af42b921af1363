"""`genarm-fast generate --input --output`: checks, progress and summary of a batch job."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from genarm_fast import jobs
from genarm_fast.cli.display import console
from genarm_fast.cli.loading import arm_names, formatted, load, read_text, resolve
from genarm_fast.cli.process import input_path
from genarm_fast.jobs.identity import digest, identity
from genarm_fast.params import SamplingParams
from genarm_fast.utils.jsonlines import dumps

SHOWN_ERRORS = 5
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".parquet")  # endings of compressed files; a job writes plain text


def run_job(args: argparse.Namespace, params: SamplingParams) -> int:
    """Run or resume the job, with all input checked before the first token. Return 1 if requests failed, else 0."""
    if not (args.input and args.output) or args.prompt is not None or args.prompt_file:
        raise ValueError("--input and --output: expected both, and no other prompt")
    if args.stream:
        raise ValueError("--stream: expected no --input with it")
    if str(args.output) == "-":
        raise ValueError(
            "--output -: expected a file, by which the job can be resumed; --json prints one answer on stdout"
        )
    if args.output.suffix in COMPRESSED:
        raise ValueError(f"--output {args.output}: expected another ending than {args.output.suffix}, it is plain text")
    args.input = input_path(args.input)
    out = console(stderr=True)
    with _counted(out, "checked") as count:
        requests = jobs.read_requests(args.input, params, arms=arm_names(args.arm), keep=args.keep, progress=count)
    if os.path.exists(args.output) and os.path.samefile(args.input, args.output):
        raise ValueError(f"--output {args.output}: expected another file than --input")
    setup = setup_digest(args)
    with _counted(out, "found in the output") as count:
        output = jobs.ResultsFile(args.output, requests, setup, overwrite=args.overwrite, progress=count)
    with output as results:
        model = load(args)
        with _progress(out, len(requests), sum(results.answered)) as progress:
            try:
                summary = jobs.run(model, requests, results, progress, as_prompt=partial(formatted, args, model))
            except (KeyboardInterrupt, ValueError):
                if results.answered:
                    out.print(f"{args.output}: lines so far: {len(results.answered)}; the same command resumes")
                raise
    if args.json:
        print(dumps(asdict(summary)))
    for id, message in summary.errors[:SHOWN_ERRORS]:
        out.print(f"id {dumps(id)}: {message}", style="red")
    failed = summary.failed
    out.print(
        f"{args.output}: {summary.answered} answered, {summary.kept} kept from an earlier run, {failed} failed"
        + (" (the same command tries them again)" if failed else "")
    )
    return 1 if failed else 0


def setup_digest(args: argparse.Namespace) -> str:
    """Return a digest of all settings that decide a line, besides its request: models, weights, templates,
    precision."""
    arms = [(identity(resolve(spec.model)), spec.weight, spec.name or Path(spec.model).name) for spec in args.arm]
    chat_template = args.chat_template and read_text(args.chat_template)
    templates = (args.prompt_template, args.arm_prompt_template, chat_template, args.chat, args.system)
    precision = [args.dtype] if args.quantization is None else [args.dtype, args.quantization]
    arguments = [value for value in (args.chat_template_kwargs, args.tools) if value is not None]
    return digest([identity(resolve(args.base)), arms, templates, *precision, *arguments])


@contextmanager
def _counted(out: Console, what: str) -> Iterator[Callable[[int], None]]:
    """Show how many lines were read. Yields a function that is called with that number."""
    with out.status("") as status:
        yield lambda lines: status.update(f"{lines:,} lines {what} ...")


@contextmanager
def _progress(out: Console, total: int, completed: int) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar. Yields a function that is called with numbers of lines and tokens."""
    started, generated = time.perf_counter(), 0
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=out) as bar:
        task = bar.add_task("", total=total, completed=completed)

        def progress(lines: int, tokens: int) -> None:
            nonlocal generated
            generated += tokens
            speed = f"{generated / (time.perf_counter() - started):.0f} tokens/s"
            bar.update(task, advance=lines, description=speed)

        yield progress
