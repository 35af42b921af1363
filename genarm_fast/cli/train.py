"""`genarm-fast train`: one option for each field of TrainConfig."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from genarm_fast.cli.loading import read_text
from genarm_fast.cli.options import json_object, unescaped
from genarm_fast.train.config import TrainConfig, hints, scalar_type


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add BASE, DATA and the options, with names, defaults and help of TrainConfig."""
    for f in fields(TrainConfig):
        if f.name in ("base", "data"):
            parser.add_argument(f.name, metavar=f.name.upper(), help=f.metadata["help"])
            continue
        hint = hints()[f.name]
        shown = "" if f.default in (None, (), False, "") else f" (default: {f.default})"
        options: dict[str, Any] = {
            "dest": f.name,
            "default": f.default,
            "required": f.name == "output",
            "help": (f.metadata["help"] + shown).replace("%", "%%"),
        }
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(hint) is Literal:
            options["choices"] = get_args(hint)
        elif f.name == "chat_template_kwargs":
            options |= {"type": json_object, "metavar": "JSON"}
        elif get_origin(hint) is tuple:
            options |= {"nargs": "+", "metavar": "NAME"}
        else:
            kind = scalar_type(hint)
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        if f.name == "prompt_template":
            options["type"] = unescaped
        if f.name == "chat_template":  # a file, as in the other commands
            options["metavar"] = "FILE"
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    parser.add_argument("--json", action="store_true", help="print the report as JSON, and no progress")


def run(args: argparse.Namespace) -> int:
    """Train, then print where the ARM is and how accurate it is, or the whole report."""
    from genarm_fast.train import processes
    from genarm_fast.train.run import train

    values = {f.name: getattr(args, f.name) for f in fields(TrainConfig)}
    if args.chat_template:
        values["chat_template"] = read_text(Path(args.chat_template))
    config = TrainConfig(
        **{**values, **{name: tuple(values[name]) for name in ("lora_targets", "columns", "report_to")}}
    )
    try:
        result = train(config, progress=not args.json)
    finally:
        processes.disconnect()
    # Only the first process prints.
    if processes.rank() > 0:
        return 0
    if args.json:
        print(json.dumps(result.report, ensure_ascii=False))
        return 0
    print(f"{result.folder}: {result.report['method']}, {result.report['steps']} steps")
    if result.accuracy is not None:
        before, final = result.report["before"], result.report["final"]
        print(
            f"accuracy on {final['pairs']} held-out pairs: {before['accuracy']:.3f} before, {result.accuracy:.3f} after"
        )
    return 0
