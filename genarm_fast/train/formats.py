"""Rows as data sets of preferences have them, read as pairs: texts, chats, transcripts, and TRL's forms of each."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from genarm_fast.text.chats import template_arguments
from genarm_fast.text.messages import Message, UnsupportedContent, as_message, check_text
from genarm_fast.text.transcripts import ASSISTANT, HUMAN, is_transcript, standard
from genarm_fast.utils.checks import check_real
from genarm_fast.utils.jsonlines import loads

Side = str | Message | list[Message]
IMAGES = ("image", "images")


@dataclass(frozen=True)
class Pair:
    """One comparison. An incomplete response was cut on purpose and gets no EOS.

    chosen, rejected: texts, whole messages where they hold more than a text, or several messages. options: what the
    chat template takes besides messages, such as `tools`. trimmed: whether a human turn was cut off the end. margin: by
    how much β_r times the difference of rewards should exceed 0.
    `row` counts rows from 0; `line`, for errors, the lines of the file from 1, blank ones too.
    """

    row: int
    prompt: str | list[Message]
    chosen: Side
    rejected: Side
    chosen_complete: bool = True
    rejected_complete: bool = True
    line: int = field(default=0, compare=False)
    options: Mapping[str, Any] = field(default_factory=dict)
    trimmed: bool = field(default=False, compare=False)
    margin: float = 0.0

    @property
    def several(self) -> bool:
        """Whether a response is several messages."""
        return isinstance(self.chosen, list) or isinstance(self.rejected, list)

    @property
    def key(self) -> str:
        """The prompt as text: what the held-out split is drawn by."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt, ensure_ascii=False)

    @property
    def identity(self) -> bytes:
        """A hash of the prompt and both responses."""
        return self._hash(self.chosen, self.rejected)

    @property
    def opposite(self) -> bytes:
        """The identity of the pair that prefers the other response."""
        return self._hash(self.rejected, self.chosen)

    def _hash(self, *sides: Side) -> bytes:
        parts = (self.key, *(json.dumps(side, sort_keys=True) for side in sides))
        return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).digest()


class Dropped(Exception):
    """This row is well-formed but no usable pair."""


def parse(
    index: int, row: Mapping[str, Any], columns: Mapping[str, str], chosen_by: str | None, format: str
) -> tuple[str, Pair]:
    """(format, pair) of a row: "text", "implicit", "messages" or "transcript". columns, chosen_by: as of `load_pairs`.

    format: that of the rows before, "" for the first.

    Raises:
        ValueError: a malformed row, or one of another format.
        Dropped: a row that is no usable pair.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected a row with named columns, got {row!r:.60}")
    row = _named({name: _listed(value) for name, value in row.items()}, columns, chosen_by)
    found = _detect(row)
    if found != (format or found):
        raise ValueError(f"expected the format {format!r} of the first line, got {found!r}")
    return found, _PARSERS[found](index, row)


def _listed(value: Any) -> Any:
    """Plain values in place of tensors and arrays, as `Dataset.with_format` gives them; lists in place of tuples."""
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value


def _named(row: Mapping[str, Any], columns: Mapping[str, str], chosen_by: str | None) -> Mapping[str, Any]:
    """A row with the names that are used here; chosen and rejected by the column that says which is which."""
    for name, column in columns.items():
        if column not in row:
            raise ValueError(f"field {column!r} ({name}) is missing, found {sorted(row)}")
    row = {**row, **{name: row[column] for name, column in columns.items()}}
    sides = ("response_0", "response_1")
    if chosen_by is None:
        if "chosen" not in row and all(side in row for side in sides):
            which = [name for name in row if name.endswith("_id")] or ["a column with 0 or 1"]
            raise ValueError(f"field 'chosen' is missing beside {sides}: expected chosen_by, {' or '.join(which)}")
        return row
    for name in (chosen_by, *sides):
        if name not in row:
            raise ValueError(f"field {name!r} is missing, found {sorted(row)}")
    which = row[chosen_by]
    if which not in (0, 1) or isinstance(which, float):
        raise ValueError(f"field {chosen_by!r}: expected 0 or 1, got {which!r:.60}")
    return {**row, "chosen": row[sides[int(which)]], "rejected": row[sides[1 - int(which)]]}


def _detect(row: Mapping[str, Any]) -> str:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise ValueError(f"field {name!r} is missing, found {sorted(row)}")
    if any(isinstance(row.get(name), list) for name in ("prompt", "chosen", "rejected")):
        return "messages"
    if row.get("prompt") is not None:
        return "text"
    texts = [standard(_text(row, name)) for name in ("chosen", "rejected")]
    return "transcript" if any(turn in text for text in texts for turn in (HUMAN, ASSISTANT)) else "implicit"


def _text(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row.get(name), str):
        raise ValueError(f"field {name!r}: expected a string, got {row.get(name)!r:.60}")
    return check_text(f"field {name!r}", row[name])


def _messages(row: Mapping[str, Any], name: str) -> list[Message]:
    value = row[name]
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {name!r}: expected a list of messages, got {value!r:.60}")
    try:
        return [as_message(message) for message in value]
    except UnsupportedContent as error:
        raise Dropped(str(error)) from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"field {name!r}: {error}") from error


def _options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row wants its chat template to be given."""
    tools, options = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):  # as `datasets` keeps lists whose entries differ
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


def _margin(row: Mapping[str, Any]) -> float:
    value = row.get("margin")
    if value is None:
        return 0.0
    try:
        return check_real("margin", value, "a finite number", -math.inf)
    except (TypeError, ValueError):
        raise ValueError(f"field 'margin': expected a finite number, got {value!r:.60}") from None


def _pair(
    index: int,
    row: Mapping[str, Any],
    prompt: str | list[Message],
    sides: Sequence[Side],
    *,
    trimmed: bool = False,
) -> Pair:
    complete: dict[str, bool] = {}
    for name in ("chosen_complete", "rejected_complete"):
        value = row.get(name)  # None: `datasets` fills up columns that some rows lack
        if not isinstance(value, bool | None):
            raise ValueError(f"field {name!r}: expected true or false, got {value!r:.60}")
        complete[name] = value is not False
    for name in IMAGES:
        if row.get(name):
            raise ValueError(f"field {name!r}: expected texts alone, images are not trained on")
    options = _options(row)
    if options and isinstance(prompt, str):
        raise ValueError(f"field {min(options)!r}: expected messages with it")
    # The text of a message with nothing else in it.
    chosen, rejected = (side["content"] if isinstance(side, dict) and len(side) == 2 else side for side in sides)
    if chosen == rejected:
        raise Dropped("chosen equals rejected")
    if any(isinstance(side, str) and not side.strip() for side in (chosen, rejected)):
        raise Dropped("empty response")
    return Pair(index, prompt, chosen, rejected, **complete, options=options, trimmed=trimmed, margin=_margin(row))


def _parse_text(index: int, row: Mapping[str, Any]) -> Pair:
    prompt, *sides = (_text(row, name) for name in ("prompt", "chosen", "rejected"))
    if not is_transcript(prompt):
        return _pair(index, row, prompt, sides)
    if all(side.startswith(prompt) for side in sides):  # whole transcripts beside their beginning
        sides = [side[len(prompt) :] for side in sides]
    answers = [side.partition(HUMAN)[0] for side in sides]
    return _pair(index, row, standard(prompt), answers, trimmed=answers != sides)


def _parse_implicit(index: int, row: Mapping[str, Any]) -> Pair:
    """Plain texts without a prompt: it is what both begin with, up to the space before they part, as in TRL."""
    sides = [_text(row, name) for name in ("chosen", "rejected")]
    shortest = min(map(len, sides))
    common = next((at for at in range(shortest) if sides[0][at] != sides[1][at]), shortest)
    if common == shortest:
        common -= 1  # one text begins the other, and keeps its last character
    elif sides[0][:common].endswith(" "):
        common -= 1
    if sides[0] != sides[1] and common < 1:
        raise ValueError("field 'prompt' is missing, and 'chosen' and 'rejected' begin with nothing in common")
    return _pair(index, row, sides[0][:common], [side[common:] for side in sides])


def _parse_transcript(index: int, row: Mapping[str, Any]) -> Pair:
    prompts, sides, trimmed = [], [], False
    for name in ("chosen", "rejected"):
        text = standard(_text(row, name))
        before, begin, answer = text.rpartition(ASSISTANT)
        if not begin and HUMAN in text:
            raise Dropped("transcript without an assistant's turn")
        if not begin:
            raise ValueError(f"field {name!r}: expected a transcript with {ASSISTANT!r}, or a 'prompt' field")
        answer, human, _ = answer.partition(HUMAN)
        trimmed |= bool(human)
        prompts.append(before + begin)
        sides.append(answer)
    if prompts[0] != prompts[1]:
        raise Dropped("transcripts differ before the last turn")
    return _pair(index, row, prompts[0], sides, trimmed=trimmed)


def _joined(prompt: list[Message], common: list[Message]) -> list[Message]:
    """The prompt and what both sides begin with, once where they are the same but for a system message, say."""
    if not common:
        return prompt
    if common[0]["role"] == "assistant":  # they go on, also where the user says the same again
        return [*prompt, *common]
    if prompt[-len(common) :] == common:
        return prompt
    if common[-len(prompt) :] == prompt:
        return common
    if prompt[-1]["role"] == "user":
        raise ValueError("field 'chosen': expected the messages of 'prompt' first, or the response alone")
    return [*prompt, *common]


def _parse_messages(index: int, row: Mapping[str, Any]) -> Pair:
    prompt = row.get("prompt")
    prefix = (
        [{"role": "user", "content": _text(row, "prompt")}]
        if isinstance(prompt, str)
        else _messages(row, "prompt")
        if prompt
        else []
    )
    sides = [
        [{"role": "assistant", "content": _text(row, name)}] if isinstance(row[name], str) else _messages(row, name)
        for name in ("chosen", "rejected")
    ]
    # Some data sets repeat the prompt in front of each response.
    repeated = [side[: len(prefix)] == prefix for side in sides]
    sides = [side[len(prefix) :] if again else side for side, again in zip(sides, repeated)]
    common: list[Message] = []
    while len(sides[0]) > 1 and len(sides[1]) > 1 and sides[0][0] == sides[1][0]:
        common.append(sides[0][0])
        sides = [side[1:] for side in sides]
    prefix = [*prefix, *common] if any(repeated) else _joined(prefix, common)
    if not prefix:
        raise ValueError("field 'prompt': expected messages before the responses, found none")
    for name, side in zip(("chosen", "rejected"), sides):
        roles = [message["role"] for message in side]
        if not roles or roles[0] != "assistant" or roles[-1] != "assistant":
            raise ValueError(
                f"field {name!r}: expected messages that begin and end with the assistant's after the prompt, "
                f"got {', '.join(roles) or 'none'}"
            )
    return _pair(index, row, prefix, [side if len(side) > 1 else side[0] for side in sides])


_PARSERS = {
    "text": _parse_text,
    "implicit": _parse_implicit,
    "messages": _parse_messages,
    "transcript": _parse_transcript,
}
