"""`genarm-fast generate`: text for one prompt; with --input, a batch job."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from genarm_fast.cli.display import console, show_report
from genarm_fast.cli.loading import add_format_arguments, add_loading_arguments, arm_names, formatted, load, read_text
from genarm_fast.cli.options import add_sampling_arguments, sampling_params
from genarm_fast.cli.process import typed
from genarm_fast.utils.jsonlines import dumps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for prompt, output, batch job, models and sampling."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the prompt; none, or '-': what stdin gives")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the prompt from a file")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.add_argument("--stream", action="store_true", help="print text as it comes (a terminal's default)")
    job = parser.add_argument_group("batch job")
    job.add_argument(
        "-i", "--input", type=Path, metavar="FILE", help="JSON lines: prompt, id, sampling parameters; -: stdin"
    )
    job.add_argument("-o", "--output", type=Path, metavar="FILE", help="JSON lines; an unfinished job is resumed")
    job.add_argument(
        "--keep", action="append", default=[], metavar="FIELD", help="copy this field of each line; repeat for several"
    )
    job.add_argument("--overwrite", action="store_true", help="begin anew, whatever the output file holds")
    add_loading_arguments(parser)
    add_format_arguments(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print text (or JSON) on stdout, and everything else on stderr."""
    params = sampling_params(args, arm_names(args.arm))
    if args.input or args.output:
        from genarm_fast.cli.batch import run_job

        return run_job(args, params)
    if args.overwrite or args.keep:
        raise ValueError(f"{'--overwrite' if args.overwrite else '--keep'}: expected --input and --output with it")
    if args.stream and (args.json or params.n > 1):
        raise ValueError("--stream: expected neither --json nor --n above 1 with it")
    text = _prompt(args)
    model = load(args)
    prompt = formatted(args, model, text)
    if args.json:
        from genarm_fast.text.detokenize import token_text

        print(dumps(model.generate([prompt], params)[0].to_dict(partial(token_text, model.tokenizer))))
        return 0
    if args.stream or (sys.stdout.isatty() and params.n == 1):
        with model.stream(prompt, params) as stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)
        print()
        output = stream.output
    else:
        output = model.generate([prompt], params)[0]
        for number, completion in enumerate(output.completions, 1):
            if params.n > 1:
                print(f"--- {number} of {params.n} ---")
            print(completion.text)
    show_report(console(stderr=True), output, model.tokenizer)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt_file and args.prompt is not None:
        raise ValueError(f"--prompt-file {args.prompt_file}: expected no PROMPT with it")
    if args.prompt_file:
        text = read_text(args.prompt_file)
    elif args.prompt is None or args.prompt == "-":
        if sys.stdin.isatty():
            raise ValueError("PROMPT: expected a prompt, --prompt-file, or text on stdin")
        text = typed(sys.stdin.read())
    else:
        return args.prompt
    return text.removesuffix("\n")
