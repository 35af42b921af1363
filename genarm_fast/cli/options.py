"""The sampling options, read from SamplingParams: its fields, types, defaults and docs."""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from genarm_fast.params import SamplingParams, Weight, weights_per_arm
from genarm_fast.utils.jsonlines import loads

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def add_sampling_arguments(parser: argparse.ArgumentParser, without: Collection[str] = (), **defaults: Any) -> None:
    """Add one option for each field of SamplingParams. `defaults` replace the fields' own defaults."""
    group = parser.add_argument_group("sampling")
    docs = _field_docs()
    for field in sampling_fields(without):
        default = defaults.get(field.name, field.default)
        option = _OPTIONS[str(field.type)]
        if default is True:  # a flag that can only be set would change nothing
            option = {"action": argparse.BooleanOptionalAction}
        note = "; repeat for several" if option.get("action") == "append" else ""
        if default is not None and default is not False and default != ():
            note = f" (default: {default})"
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            default=defaults.get(field.name, argparse.SUPPRESS),
            help=(docs[field.name].rstrip(".") + note).replace("%", "%%"),
            **option,
        )


def sampling_params(args: argparse.Namespace, arm_names: Sequence[str]) -> SamplingParams:
    """Return the parameters that the options ask for.

    Raises:
        ValueError, TypeError: as SamplingParams, and for weights that do not match the ARMs in `arm_names`.
    """
    given = {field.name: getattr(args, field.name) for field in sampling_fields() if hasattr(args, field.name)}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    params = SamplingParams(**given)
    if params.weights is not None:
        weights_per_arm(params.weights, arm_names, [spec.weight for spec in args.arm])
    return params


def sampling_fields(without: Collection[str] = ()) -> list[Field[Any]]:
    """Return the fields that text can express (processors are code), except those in `without`."""
    return [field for field in fields(SamplingParams) if field.name not in ("logits_processors", *without)]


def parse_field(field: Field[Any], text: str) -> Any:
    """Return a field's value as typed in a chat; `none` is its default. Raises ValueError for other text."""
    if text == "none":
        return field.default
    option = _OPTIONS[str(field.type)]
    convert: Callable[[str], Any] = option.get("type", str)
    try:
        if option.get("action") == "store_true":
            return {"on": True, "off": False}[text]
        if field.name == "stop":
            return (unescaped(text),)
        if option.get("action") == "append":
            values = [convert(part) for part in text.split()]
            return dict(values) if field.name == "logit_bias" else tuple(values)
        return convert(text)
    except (KeyError, ValueError, argparse.ArgumentTypeError):
        expected = "on or off" if option.get("action") == "store_true" else f"{option['metavar']} or none"
        raise ValueError(f"{field.name}={text!r}: expected {expected}") from None


def numbers(text: str) -> float | tuple[Weight, ...] | dict[str, Weight]:
    """Parse weights: `1.5` is for every ARM; `1,0.5` or `1 0.5` has one for each; `kind=1,terse=0.5` names ARMs.

    In place of an ARM's number, `2:1:0.5` has one number for each token; the last one repeats.
    """
    parts = [part.rpartition("=") for part in text.replace(",", " ").split()]
    named = [bool(sign) for _, sign, _ in parts]
    try:
        lines = [tuple(map(float, number.split(":"))) for *_, number in parts]
    except ValueError:
        lines = []
    if not lines or not all(math.isfinite(number) for line in lines for number in line) or any(named) != all(named):
        expected = "a finite number, or one per ARM separated by commas (W:W:... by token), or NAME=W for some ARMs"
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    values = tuple(line if len(line) > 1 else line[0] for line in lines)
    if all(named):
        return {name: value for (name, *_), value in zip(parts, values)}
    return values if len(values) > 1 or isinstance(values[0], tuple) else values[0]


def weight_text(weight: Weight) -> str:
    """Return a weight as it is typed."""
    return ":".join(f"{number:g}" for number in weight) if isinstance(weight, tuple) else f"{weight:g}"


def unescaped(text: str) -> str:
    r"""Return text as typed between a shell's quotes, with the escapes \n, \t, \r and \\ replaced."""
    return re.sub(r"\\([ntr\\])", lambda match: ESCAPES[match[1]], text)


def tools_list(text: str) -> list[dict[str, Any]]:
    """Read a JSON list of tools, or a file that holds one; the type of an option."""
    what = "expected a JSON list of tools, each an object, or a file with one"
    try:
        tools = loads(text if text.lstrip()[:1] in ("[", "{") else Path(text).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.80}: {what}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r:.80}: {what}: {error}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise argparse.ArgumentTypeError(f"{text!r:.80}: {what}")
    return tools


def json_object(text: str) -> dict[str, Any]:
    """Read a JSON object; the type of an option."""
    try:
        value, why = loads(text), ""
    except (ValueError, RecursionError) as error:
        value, why = None, f": {error}"
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r:.200}: expected a JSON object{why}")
    return value


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected ID=BIAS") from None


_OPTIONS: dict[str, dict[str, Any]] = {
    "bool": {"action": "store_true"},
    "int": {"type": int, "metavar": "N"},
    "int | None": {"type": int, "metavar": "N"},
    "float": {"type": float, "metavar": "X"},
    "float | None": {"type": float, "metavar": "X"},
    "AnyWeights | None": {"type": numbers, "metavar": "W[,W...]"},
    "str | Sequence[str]": {"action": "append", "type": unescaped, "metavar": "TEXT"},
    "Sequence[int]": {"action": "append", "type": int, "metavar": "ID"},
    "Sequence[int] | None": {"action": "append", "type": int, "metavar": "ID"},
    "Mapping[int, float] | None": {"action": "append", "type": _bias, "metavar": "ID=BIAS"},
}


def _field_docs() -> dict[str, str]:
    """Return the `Args:` section of SamplingParams' docstring, by field."""
    # Read from the source, because PYTHONOPTIMIZE=2 strips docstrings.
    (definition,) = ast.parse(inspect.getsource(SamplingParams)).body
    assert isinstance(definition, ast.ClassDef)
    section = (ast.get_docstring(definition) or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
