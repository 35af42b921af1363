"""`genarm-fast train`: one option for each field of TrainConfig."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .config import TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; names, defaults and help are those of TrainConfig."""
    hints = get_type_hints(TrainConfig)
    for f in fields(TrainConfig):
        if f.name in ("base", "data", "output"):
            parser.add_argument(
                f.name if f.name != "output" else "--output",
                **({"required": True} if f.name == "output" else {}),
                help=f.metadata["help"],
            )
            continue
        flag = "--" + f.name.replace("_", "-")
        text = f.metadata["help"].replace("%", "%%") + (
            "" if f.default in (None, (), False) else f" (default: {f.default})"
        )
        hint = hints[f.name]
        options: dict[str, Any] = {"help": text, "default": f.default, "dest": f.name}
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif get_origin(hint) is Literal:
            parser.add_argument(flag, choices=get_args(hint), **options)
        elif get_origin(hint) is tuple:
            parser.add_argument(flag, nargs="+", **options)
        else:
            kind = next(t for t in (int, float, str) if t is hint or t in get_args(hint))
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), **options)
    parser.add_argument("--json", action="store_true", help="print the report as JSON, and nothing else")


def run(args: argparse.Namespace) -> int:
    """Trains; prints where the ARM is and how good, or the whole report."""
    from .run import train

    values = {f.name: getattr(args, f.name) for f in fields(TrainConfig)}
    values["lora_targets"] = tuple(values["lora_targets"])
    result = train(TrainConfig(**values), progress=not args.json)
    if args.json:
        print(json.dumps(result.report, ensure_ascii=False))
    else:
        accuracy = "" if result.accuracy is None else f", held-out pair accuracy {result.accuracy:.3f}"
        print(f"{result.folder}: {result.report['steps']} steps{accuracy}")
    return 0
