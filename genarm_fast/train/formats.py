"""Read rows of preference data sets as pairs: texts, chats, transcripts, and TRL's forms of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from genarm_fast.text.messages import Message
from genarm_fast.text.transcripts import ASSISTANT, HUMAN, is_transcript, standard
from genarm_fast.train.rows import Dropped, margin_of, messages_of, named_row, options_of, text_of

Side = str | Message | list[Message]
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")  # names of columns that hold no text


@dataclass(frozen=True)
class Pair:
    """One comparison of two responses. An incomplete response was cut on purpose and gets no EOS.

    row: number of the row, from 0. chosen, rejected: texts, whole messages if they hold more than a text, or several
    messages. line: number of the line in the file, from 1, blank lines included; for errors. options: arguments of the
    chat template besides messages, such as `tools`. trimmed: whether a human turn was cut off the end. margin: how far
    β_r times the difference of rewards should exceed 0.
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
        """The prompt as text, by which the held-out split is drawn."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt, ensure_ascii=False)

    @property
    def content_hash(self) -> bytes:
        """A hash of the prompt and both responses."""
        return self._hash(self.chosen, self.rejected)

    @property
    def swapped_hash(self) -> bytes:
        """The content hash of the pair that prefers the other response."""
        return self._hash(self.rejected, self.chosen)

    def _hash(self, *sides: Side) -> bytes:
        parts = (self.key, *(json.dumps(side, sort_keys=True) for side in sides))
        return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).digest()


def parse(
    index: int, row: Mapping[str, Any], columns: Mapping[str, str], chosen_by: str | None, format: str
) -> tuple[str, Pair]:
    """Return the format and the pair of a row. The format is "text", "implicit", "messages" or "transcript".

    columns, chosen_by: as in `load_pairs`. format: the format of the rows before; "" for the first row.

    Raises:
        ValueError: a malformed row, or a row of another format.
        Dropped: a row that gives no usable pair.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected a row with named columns, got {row!r:.60}")
    row = named_row(row, columns, chosen_by)
    found = _detect(row)
    if found != (format or found):
        raise ValueError(f"expected the format {format!r} of the first line, got {found!r}")
    return found, _PARSERS[found](index, row)


def _detect(row: Mapping[str, Any]) -> str:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise ValueError(f"field {name!r} is missing, found {sorted(map(str, row))}")
    if any(isinstance(row.get(name), list) for name in ("prompt", "chosen", "rejected")):
        return "messages"
    if row.get("prompt") is not None:
        return "text"
    texts = [standard(text_of(row, name)) for name in ("chosen", "rejected")]
    return "transcript" if any(turn in text for text in texts for turn in (HUMAN, ASSISTANT)) else "implicit"


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
        # `datasets` fills columns that some rows lack with None.
        value = row.get(name)
        if not isinstance(value, bool | None):
            raise ValueError(f"field {name!r}: expected true or false, got {value!r:.60}")
        complete[name] = value is not False
    for name in MEDIA_COLUMNS:
        if row.get(name):
            raise ValueError(f"field {name!r}: expected texts alone, images, videos and sounds are not trained on")
    options = options_of(row)
    if options and isinstance(prompt, str):
        raise ValueError(f"field {min(options)!r}: expected messages with it")
    # A message that holds only role and content becomes its text.
    chosen, rejected = (side["content"] if isinstance(side, dict) and len(side) == 2 else side for side in sides)
    if chosen == rejected:
        raise Dropped("chosen equals rejected")
    if any(isinstance(side, str) and not side.strip() for side in (chosen, rejected)):
        raise Dropped("empty response")
    return Pair(index, prompt, chosen, rejected, **complete, options=options, trimmed=trimmed, margin=margin_of(row))


def _parse_text(index: int, row: Mapping[str, Any]) -> Pair:
    prompt, *sides = (text_of(row, name) for name in ("prompt", "chosen", "rejected"))
    if not is_transcript(prompt):
        return _pair(index, row, prompt, sides)
    if all(side.startswith(prompt) for side in sides):  # whole transcripts, given besides their beginning
        sides = [side[len(prompt) :] for side in sides]
    answers = [side.partition(HUMAN)[0] for side in sides]
    return _pair(index, row, standard(prompt), answers, trimmed=answers != sides)


def _parse_implicit(index: int, row: Mapping[str, Any]) -> Pair:
    """Read plain texts without a prompt, which is what both begin with, up to the space before they differ.

    TRL does the same.
    """
    sides = [text_of(row, name) for name in ("chosen", "rejected")]
    shortest = min(map(len, sides))
    common = next((at for at in range(shortest) if sides[0][at] != sides[1][at]), shortest)
    if common == shortest:
        common -= 1  # one text is the beginning of the other; the response keeps its last character
    elif sides[0][:common].endswith(" "):
        common -= 1
    if sides[0] != sides[1] and common < 1:
        raise ValueError("field 'prompt' is missing, and 'chosen' and 'rejected' begin with nothing in common")
    return _pair(index, row, sides[0][:common], [side[common:] for side in sides])


def _parse_transcript(index: int, row: Mapping[str, Any]) -> Pair:
    prompts, sides, trimmed = [], [], False
    for name in ("chosen", "rejected"):
        text = standard(text_of(row, name))
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
    """Return the prompt followed by what both sides begin with.

    Messages that are in both, for example all but a system message, appear once.
    """
    if not common:
        return prompt
    # The sides continue the prompt, even if the user says the same again.
    if common[0]["role"] == "assistant":
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
        [{"role": "user", "content": text_of(row, "prompt")}]
        if isinstance(prompt, str)
        else messages_of(row, "prompt")
        if prompt
        else []
    )
    sides = [
        [{"role": "assistant", "content": text_of(row, name)}] if isinstance(row[name], str) else messages_of(row, name)
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
