"""Preference pairs from JSON lines or `datasets`: format detection, checks, and the held-out split."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from genarm_fast.text.messages import Message, UnsupportedContent, as_message
from genarm_fast.text.transcripts import ASSISTANT, HUMAN, is_transcript, standard
from genarm_fast.train.config import TrainConfig
from genarm_fast.utils.jsonlines import located, read_objects

CUT = "human turn at the end cut, kept"
SWAPPED = "also there with chosen and rejected swapped, kept"
SAVED = ("state.json", "dataset_dict.json")  # in folders of `save_to_disk`
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx")  # files of these are no JSON lines


@dataclass(frozen=True)
class Pair:
    """One comparison. An incomplete response was cut on purpose and gets no EOS.

    chosen, rejected: texts, or whole messages where they hold more than a text. options: what the chat template takes
    besides messages, such as `tools`. trimmed: whether a human turn was cut off the end.
    `row` counts rows from 0; `line`, for errors, the lines of the file from 1, blank ones too.
    """

    row: int
    prompt: str | list[Message]
    chosen: str | Message
    rejected: str | Message
    chosen_complete: bool = True
    rejected_complete: bool = True
    line: int = field(default=0, compare=False)
    options: Mapping[str, Any] = field(default_factory=dict)
    trimmed: bool = field(default=False, compare=False)

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

    def _hash(self, *sides: str | Message) -> bytes:
        parts = (self.key, *(json.dumps(side, sort_keys=True) for side in sides))
        return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).digest()


@dataclass
class Pairs:
    """Pairs of one source. `dropped` counts reasons."""

    format: str
    pairs: list[Pair]
    dropped: Counter[str]
    rows: int

    @property
    def transcripts(self) -> bool:
        """Whether all prompts are transcripts."""
        return all(isinstance(pair.prompt, str) and is_transcript(pair.prompt) for pair in self.pairs)


class Dropped(Exception):
    """This row is well-formed but no usable pair."""


def reading(config: TrainConfig) -> dict[str, Any]:
    """What `load_pairs` is told of the data's rows."""
    return {
        "columns": dict(each.split("=", 1) for each in config.columns),
        "chosen_by": config.chosen_by,
        "on_bad_row": config.on_bad_row,
        "dataset_split": config.dataset_split,
        "dataset_dir": config.dataset_dir,
    }


def load_pairs(
    source: str | Iterable[Mapping[str, Any]],
    *,
    dataset_split: str = "train",
    dataset_dir: str | None = None,
    columns: Mapping[str, str] | None = None,
    chosen_by: str | None = None,
    on_bad_row: str = "error",
    name: str = "data",
) -> Pairs:
    """Reads every row; the first one tells the format, "text", "messages" or "transcript".

    Args:
        source: a file, a folder, a `datasets` id, or rows: a `datasets.Dataset`, say.
        columns: names of columns that the rows have otherwise, {"prompt": "question"}, say.
        chosen_by: a column with 0 or 1: which of the columns response_0 and response_1 is chosen.
        on_bad_row: "error", or "drop": count a malformed row and go on.
        name: what errors call the argument `source`.

    Raises:
        ValueError: a malformed row, naming source, line and field; no usable pair.
    """
    title = source if isinstance(source, str) else name
    format = ""
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    seen: set[bytes] = set()
    rows = 0
    for number, row in _rows(name, source, dataset_split, dataset_dir):
        try:
            with located(title, number):
                row = _named(row, columns or {}, chosen_by)
                found = _detect(row)
                if found != (format or found):
                    raise ValueError(f"expected the format {format!r} of the first line, got {found!r}")
                pair = _PARSERS[found](rows, row)
                format = found
                if pair.identity in seen:
                    raise Dropped("duplicate")
                dropped.update([SWAPPED] * (pair.opposite in seen))
                seen.add(pair.identity)
                dropped.update([CUT] * pair.trimmed)
                pairs.append(replace(pair, line=number))
        except Dropped as reason:
            dropped[str(reason)] += 1
        except ValueError:
            if on_bad_row != "drop":
                raise
            dropped["malformed row"] += 1
        rows += 1
    if not pairs:
        raise ValueError(f"{title}: expected preference pairs, found none usable in {rows} rows ({dict(dropped)})")
    return Pairs(format, pairs, dropped, rows)


def split_pairs(pairs: list[Pair], config: TrainConfig) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs; depends on rows or prompts alone, so every caller with this config agrees.

    By hash, all pairs of one prompt land on the same side.
    """
    if config.eval_data is not None:
        return pairs, load_pairs(config.eval_data, **reading(config), name="eval_data").pairs
    held = [pair for pair in pairs if is_held_out(pair, config)]
    return [pair for pair in pairs if not is_held_out(pair, config)], held


def is_held_out(pair: Pair, config: TrainConfig) -> bool:
    if config.holdout_every is not None:
        return pair.row % config.holdout_every == 0
    digest = hashlib.sha256(f"{config.seed}\0{pair.key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < config.holdout_fraction * 2**64


def _rows(
    name: str, source: str | Iterable[Mapping[str, Any]], dataset_split: str, dataset_dir: str | None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not isinstance(source, str):
        if isinstance(source, Mapping):  # a DatasetDict
            raise TypeError(f"{name}: expected rows, got splits {sorted(source)}: choose one of them")
        yield from enumerate(source, 1)
    elif Path(source).is_file():
        if source.endswith(TABLES):
            raise ValueError(f"{name}={source!r}: expected JSON lines, or a folder of such tables, for `datasets`")
        yield from read_objects(source)
    elif source.endswith((".jsonl", ".json", ".gz", *TABLES)):
        raise ValueError(f"{name}={source!r}: expected a file that exists, or a `datasets` id")
    else:
        from datasets import load_dataset, load_from_disk

        folder = Path(source, dataset_dir or "")
        try:
            if any((folder / file).is_file() for file in SAVED):
                saved = load_from_disk(str(folder))
                rows = saved[dataset_split] if isinstance(saved, dict) else saved
            else:
                rows = load_dataset(source, data_dir=dataset_dir, split=dataset_split)
        except KeyError as error:
            raise ValueError(f"{name}={source!r}: dataset_split={dataset_split!r}: expected a split of it") from error
        except (ValueError, OSError) as error:  # no data there, no such split, or the hub out of reach
            raise ValueError(f"{name}={source!r}, dataset_split={dataset_split!r}: {error}") from error
        yield from enumerate(rows, 1)


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
    return "text" if row.get("prompt") is not None else "transcript"


def _text(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row.get(name), str):
        raise ValueError(f"field {name!r}: expected a string, got {row.get(name)!r:.60}")
    return row[name]


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
    for name, value, kind in (("tools", tools, list), ("chat_template_kwargs", options, Mapping)):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"field {name!r}: expected a {'list' if kind is list else 'mapping'}, got {value!r:.60}")
    return {**(options or {}), **({"tools": tools} if tools else {})}


def _pair(
    index: int,
    row: Mapping[str, Any],
    prompt: str | list[Message],
    sides: Sequence[str | Message],
    *,
    trimmed: bool = False,
) -> Pair:
    complete: dict[str, bool] = {}
    for name in ("chosen_complete", "rejected_complete"):
        value = row.get(name)  # None: `datasets` fills up columns that some rows lack
        if not isinstance(value, bool | None):
            raise ValueError(f"field {name!r}: expected true or false, got {value!r:.60}")
        complete[name] = value is not False
    options = _options(row)
    if options and isinstance(prompt, str):
        raise ValueError(f"field {min(options)!r}: expected messages with it")
    # The text of a message with nothing else in it.
    chosen, rejected = (side["content"] if isinstance(side, dict) and len(side) == 2 else side for side in sides)
    if chosen == rejected:
        raise Dropped("chosen equals rejected")
    if any(isinstance(side, str) and not side.strip() for side in (chosen, rejected)):
        raise Dropped("empty response")
    return Pair(index, prompt, chosen, rejected, **complete, options=options, trimmed=trimmed)


def _parse_text(index: int, row: Mapping[str, Any]) -> Pair:
    prompt, *sides = (_text(row, name) for name in ("prompt", "chosen", "rejected"))
    if not is_transcript(prompt):
        return _pair(index, row, prompt, sides)
    if all(side.startswith(prompt) for side in sides):  # whole transcripts beside their beginning
        sides = [side[len(prompt) :] for side in sides]
    answers = [side.partition(HUMAN)[0] for side in sides]
    return _pair(index, row, standard(prompt), answers, trimmed=answers != sides)


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
    if not common or prompt[-len(common) :] == common:
        return prompt
    if common[-len(prompt) :] == prompt:
        return common
    if prompt[-1]["role"] == "user" and common[0]["role"] != "assistant":
        raise ValueError("field 'chosen': expected the messages of 'prompt' first, or the response alone")
    return [*prompt, *common]


def _parse_messages(index: int, row: Mapping[str, Any]) -> Pair:
    prompt = row.get("prompt")
    prefix = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(row, "prompt") if prompt else []
    )
    sides = [
        [{"role": "assistant", "content": row[name]}] if isinstance(row[name], str) else _messages(row, name)
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
        if len(side) != 1 or side[0]["role"] != "assistant":
            raise ValueError(
                f"field {name!r}: expected one assistant message after the prompt, got {len(side)} messages"
            )
    return _pair(index, row, prefix, [sides[0][0], sides[1][0]])


_PARSERS = {"text": _parse_text, "messages": _parse_messages, "transcript": _parse_transcript}
