"""Options that several commands share. The sampling ones are read off SamplingParams: its fields, types and docs."""

from __future__ import annotations

import argparse
import inspect
import math
import re
from dataclasses import MISSING, Field, fields
from typing import Any

from genarm_fast.params import SamplingParams


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of SamplingParams; those not given stay out of the namespace."""
    group = parser.add_argument_group("sampling")
    docs = _field_docs()
    for field in sampling_fields():
        default = "" if field.default in (MISSING, None, (), False) else f" (default: {field.default})"
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            default=argparse.SUPPRESS,
            help=(docs[field.name].rstrip(".") + default).replace("%", "%%"),
            **_KINDS[str(field.type)],
        )


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """What the sampling options ask for. Raises ValueError, TypeError as SamplingParams does."""
    given = {field.name: getattr(args, field.name) for field in sampling_fields() if hasattr(args, field.name)}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return SamplingParams(**given)


def sampling_fields() -> list[Field[Any]]:
    """The fields that text can express: all but the processors, which are code."""
    return [field for field in fields(SamplingParams) if field.name != "logits_processors"]


def numbers(text: str) -> float | tuple[float, ...]:
    """`1.5` → 1.5, for every ARM; `1,0.5` or `1 0.5` → one number each."""
    values = tuple(_number(part) for part in text.replace(",", " ").split())
    if not values:
        raise argparse.ArgumentTypeError("expected a number, or one per ARM separated by commas")
    return values if len(values) > 1 else values[0]


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected finite numbers, got {text!r}")
    return value


def _bias(text: str) -> tuple[int, float]:
    token, found, bias = text.partition("=")
    try:
        if found:
            return int(token), float(bias)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected ID=BIAS, got {text!r}")


_KINDS: dict[str, dict[str, Any]] = {
    "bool": {"action": "store_true"},
    "int": {"type": int, "metavar": "N"},
    "int | None": {"type": int, "metavar": "N"},
    "float": {"type": float, "metavar": "X"},
    "float | Sequence[float] | None": {"type": numbers, "metavar": "W[,W...]"},
    "str | Sequence[str]": {"action": "append", "metavar": "TEXT"},
    "Sequence[int]": {"action": "append", "type": int, "metavar": "ID"},
    "Mapping[int, float] | None": {"action": "append", "type": _bias, "metavar": "ID=BIAS"},
}


def _field_docs() -> dict[str, str]:
    """The `Args:` section of SamplingParams' docstring, by field."""
    section = (inspect.getdoc(SamplingParams) or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
