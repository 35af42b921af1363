"""A row of a data set before its format is known: its columns under this package's names, and the value of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from genarm_fast.text.chats import template_arguments
from genarm_fast.text.messages import Message, UnsupportedContent, as_message, check_text, stored_messages
from genarm_fast.utils.checks import check_real
from genarm_fast.utils.jsonlines import loads


class Dropped(Exception):
    """This row is well-formed but gives no usable pair."""


def named_row(row: Mapping[str, Any], columns: Mapping[str, str], chosen_by: str | None) -> Mapping[str, Any]:
    """Return a row of plain values under this package's names. columns, chosen_by: as in `load_pairs`.

    Raises:
        ValueError: a missing column, or a text of messages that cannot be read.
    """
    return _read(_named(_plain(row), columns, chosen_by))


def _plain(value: Any) -> Any:
    """Return lists in place of tensors, arrays and tuples at any depth. `Dataset.with_format` and pandas give these."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _named(row: Mapping[str, Any], columns: Mapping[str, str], chosen_by: str | None) -> Mapping[str, Any]:
    """Return a row under this package's names, with chosen and rejected set by the column `chosen_by`."""
    for name, column in columns.items():
        if column not in row:
            raise ValueError(f"field {column!r} ({name}) is missing, found {sorted(map(str, row))}")
    row = {**row, **{name: row[column] for name, column in columns.items()}}
    sides = ("response_0", "response_1")
    if chosen_by is None:
        if "chosen" not in row and all(side in row for side in sides):
            which = [name for name in map(str, row) if name.endswith("_id")] or ["a column with 0 or 1"]
            raise ValueError(f"field 'chosen' is missing beside {sides}: expected chosen_by, {' or '.join(which)}")
        return row
    for name in (chosen_by, *sides):
        if name not in row:
            raise ValueError(f"field {name!r} is missing, found {sorted(map(str, row))}")
    which = row[chosen_by]
    if which not in (0, 1) or isinstance(which, float):
        raise ValueError(f"field {chosen_by!r}: expected 0 or 1, got {which!r:.60}")
    return {**row, "chosen": row[sides[int(which)]], "rejected": row[sides[1 - int(which)]]}


def _read(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row with lists in place of messages that a table without types holds as text."""
    found = {}
    for name in ("prompt", "chosen", "rejected"):
        if isinstance(row.get(name), str):
            try:
                messages = stored_messages(row[name])
            except ValueError as error:
                raise ValueError(f"field {name!r}: {error}") from error
            if messages is not None:
                found[name] = messages
    for name, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if name in found and other not in found and isinstance(row.get(other), str):
            raise ValueError(f"field {name!r}: the text of messages beside a plain {other!r}: expected both alike")
    return {**row, **found}


def text_of(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row.get(name), str):
        raise ValueError(f"field {name!r}: expected a string, got {row.get(name)!r:.60}")
    return check_text(f"field {name!r}", row[name])


def messages_of(row: Mapping[str, Any], name: str) -> list[Message]:
    value = row[name]
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {name!r}: expected a list of messages, got {value!r:.60}")
    try:
        return [as_message(message) for message in value]
    except UnsupportedContent as error:
        raise Dropped(str(error)) from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"field {name!r}: {error}") from error


def options_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a row gives to its chat template."""
    tools, options = row.get("tools"), row.get("chat_template_kwargs")
    # `datasets` stores lists whose entries differ as text.
    if isinstance(tools, str):
        try:
            tools = loads(tools)
        except ValueError as error:
            raise ValueError(f"field 'tools': expected a list, or the JSON of one, got {tools!r:.60}") from error
    for name, value, kind in (("tools", tools, list), ("chat_template_kwargs", options, Mapping)):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"field {name!r}: expected a {'list' if kind is list else 'mapping'}, got {value!r:.60}")
    try:
        return template_arguments(tools, options)
    except TypeError as error:
        raise ValueError(str(error)) from None


def margin_of(row: Mapping[str, Any]) -> float:
    value = row.get("margin")
    if value is None:
        return 0.0
    try:
        return check_real("margin", value, "a finite number", -math.inf)
    except (TypeError, ValueError):
        raise ValueError(f"field 'margin': expected a finite number, got {value!r:.60}") from None
