"""Reading preference pairs: formats, malformed rows, dropped pairs, the held-out split."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genarm_fast.train import TrainConfig
from genarm_fast.train.data import Pair, load_pairs, split_pairs

Write = Callable[..., Path]
USER = {"role": "user", "content": "hi"}
GOOD, BAD = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
SYSTEM = {"role": "system", "content": "be brief"}
SYSTEM_CASE = ("messages", [SYSTEM, USER], "yes", "no")
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why\n\nAssistant:"
TEXT = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "format", "prompt", "chosen", "rejected"),
    [
        (TEXT, "text", "p", "a", "b"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "text", "", "a", "b"),
        ({"chosen": HH + " yes", "rejected": HH + " no"}, "transcript", HH, " yes", " no"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "messages", [USER], "yes", "no"),
        ({"prompt": [USER], "chosen": "yes", "rejected": "no"}, "messages", [USER], "yes", "no"),
        # UltraFeedback repeats the prompt in both sides; other data sets have no prompt column at all.
        ({"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "messages", [USER], "yes", "no"),
        # A system message only in both sides, or only in the prompt; the prompt as a later turn.
        ({"prompt": "hi", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, *SYSTEM_CASE),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, *SYSTEM_CASE),
        ({"prompt": [SYSTEM], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, *SYSTEM_CASE),
        (
            {"prompt": "hi", "chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
            "messages",
            [USER, GOOD, USER],
            "yes",
            "no",
        ),
        # Messages with which both responses begin belong to the prompt, even if one repeats the prompt.
        (
            {"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [GOOD, USER, BAD]},
            "messages",
            [USER, GOOD, USER],
            "yes",
            "no",
        ),
        ({"prompt": HH, "chosen": HH + " yes", "rejected": HH + " no"}, "text", HH, " yes", " no"),
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
            "messages",
            [USER, GOOD, USER],
            "yes",
            "no",
        ),
    ],
)
def test_formats(write_jsonl: Write, row: dict[str, Any], format: str, prompt: Any, chosen: str, rejected: str) -> None:
    loaded = load_pairs(str(write_jsonl([row])))
    assert loaded.format == format
    assert loaded.pairs == [Pair(0, prompt, chosen, rejected)]


def test_compressed(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(TEXT).encode()))
    assert load_pairs(str(path)).pairs[0].chosen == "a"


def test_datasets(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for folder in ("a", "b"):
        (tmp_path / "set" / folder).mkdir(parents=True)
        (tmp_path / "set" / folder / "train.jsonl").write_text(json.dumps(TEXT | {"prompt": folder}) + "\n")
    loaded = load_pairs(str(tmp_path / "set"), dataset_dir="b")
    assert [pair.prompt for pair in loaded.pairs] == ["b"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, "field 'rejected' is missing, found"),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, "field 'rejected': expected a string, got 3"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "field 'rejected': expected a string, got None"),
        (
            {"prompt": "p", "chosen": [GOOD], "rejected": [BAD]},
            "expected the format 'text' of the first line, got 'messages'",
        ),
        (TEXT | {"chosen_complete": "no"}, "field 'chosen_complete': expected true or false, got 'no'"),
        (TEXT | {"chosen": "a\ud800"}, r"field 'chosen'='a\\ud800': expected Unicode text"),
        (TEXT | {"prompt": "\udc00"}, r"field 'prompt'='\\udc00': expected Unicode text"),
        (TEXT | {"margin": 10**400}, "field 'margin': expected a finite number, got 1000"),
    ],
)
def test_malformed_rows_name_file_line_and_field(write_jsonl: Write, row: dict[str, Any], message: str) -> None:
    path = write_jsonl([TEXT, row])
    with pytest.raises(ValueError, match=message) as caught:
        load_pairs(str(path))
    assert f"{path} line 2:" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": "plain", "rejected": HH + " no"},
            "field 'chosen': expected a transcript with .* or a 'prompt' field",
        ),
        ({"chosen": [GOOD], "rejected": [BAD]}, "field 'prompt': expected messages before the responses"),
        (
            {"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]},
            "field 'chosen': expected messages that begin and end with the .*, got assistant, user",
        ),
        (
            {"prompt": "hi ", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "field 'chosen': expected the messages of 'prompt' first, or the response alone",
        ),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs='messages': expected what only the template knows",
        ),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": ["look"]},
            r"tools=\['look'\]: expected a list of tools, each a mapping",
        ),
        ({"prompt": [USER], "chosen": "\ud800", "rejected": [BAD]}, "field 'chosen'=.*: expected Unicode text"),
        (
            {"prompt": [{"role": "user"}], "chosen": [GOOD], "rejected": [BAD]},
            "field 'prompt': message .*expected the keys",
        ),
    ],
)
def test_malformed_first_rows(write_jsonl: Write, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pairs(str(write_jsonl([row])))


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(TEXT) + '\n{"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"}\n')
    with pytest.raises(ValueError, match=r"line 2: expected a JSON object, .*the key 'chosen' is there twice"):
        load_pairs(str(path))
    chat = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": '[{"name": "a", "name": "b"}]'}
    with pytest.raises(ValueError, match="line 1: field 'tools': expected a list, or the JSON of one"):
        load_pairs([chat])


def test_parts_without_a_type(write_jsonl: Write) -> None:
    """`datasets` fills keys that some parts lack with nulls."""
    parts = [{"type": None, "text": "hi", "image_url": None}]
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": [GOOD], "rejected": [BAD]}
    assert load_pairs(str(write_jsonl([row]))).pairs == [Pair(0, [USER], "yes", "no")]


def test_broken_json_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(TEXT) + "\n{oops\n")
    with pytest.raises(ValueError, match="line 2"):
        load_pairs(str(path))


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere.csv"])
def test_missing_file(name: str) -> None:
    with pytest.raises(ValueError, match=rf"data='{name}': expected a file that exists"):
        load_pairs(name)
    with pytest.raises(ValueError, match=rf"eval_data='{name}': expected a file that exists"):
        split_pairs([], TrainConfig(base="b", data="d", output="o", eval_data=name))


def test_tables_are_no_json_lines(tmp_path: Path) -> None:
    """A folder of such tables is a data set."""
    pytest.importorskip("datasets")
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\np,a,b\n")
    with pytest.raises(ValueError, match=r"data='.*pairs.csv': expected JSON lines, or a folder of such tables"):
        load_pairs(str(path))
    assert load_pairs(str(tmp_path)).pairs == [Pair(0, "p", "a", "b")]
    with pytest.raises(ValueError, match=rf"data='{tmp_path}', dataset_config=None, dataset_split='tast': .*tast"):
        load_pairs(str(tmp_path), dataset_split="tast")


def test_what_windows_writes(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(TEXT).encode() + b"\r\n\r\n" + json.dumps(TEXT).encode() + b"x\r\n")
    with pytest.raises(ValueError, match="line 3: expected a JSON object, got b'"):
        load_pairs(str(path))
    path.write_bytes(path.read_bytes().replace(b"x\r", b"\r").replace(b'"a"', b'"c"', 1))
    assert [(pair.row, pair.line) for pair in load_pairs(str(path)).pairs] == [(0, 1), (1, 3)]


def test_a_column_filled_up_with_null_is_missing(write_jsonl: Write) -> None:
    rows = [TEXT | {"chosen_complete": False, "rejected_complete": None}]
    (pair,) = load_pairs(str(write_jsonl(rows))).pairs
    assert (pair.chosen_complete, pair.rejected_complete) == (False, True)


def test_useless_pairs_are_dropped_and_counted(write_jsonl: Write) -> None:
    rows = [TEXT, TEXT, TEXT | {"chosen": "b"}, TEXT | {"rejected": " \n"}, TEXT | {"rejected": "c"}]
    loaded = load_pairs(str(write_jsonl(rows)))
    assert [pair.row for pair in loaded.pairs] == [0, 4]
    assert loaded.dropped == {"duplicate": 1, "chosen equals rejected": 1, "empty response": 1}
    other = {"chosen": HH + " yes", "rejected": HH.replace("why", "what") + " no"}
    loaded = load_pairs(str(write_jsonl([{"chosen": HH + " yes", "rejected": HH + " no"}, other])))
    assert loaded.dropped == {"transcripts differ before the last turn": 1}


def test_nothing_usable(write_jsonl: Write) -> None:
    with pytest.raises(ValueError, match=r"found none usable in 1 rows .*chosen equals rejected"):
        load_pairs(str(write_jsonl([TEXT | {"chosen": "b"}])))


def split(pairs: list[Pair], **options: Any) -> tuple[list[int], list[int]]:
    train, held = split_pairs(pairs, TrainConfig(base="b", data="d", output="o", **options))
    return [pair.row for pair in train], [pair.row for pair in held]


def test_split_by_row() -> None:
    """A row keeps its side when other rows are dropped."""
    pairs = [Pair(row, f"p{row}", "a", "b") for row in range(12) if row != 3]
    assert split(pairs, holdout_every=5) == ([1, 2, 4, 6, 7, 8, 9, 11], [0, 5, 10])


def test_split_by_prompt() -> None:
    """The split is repeatable, near the asked-for share, depends on the seed, and has no prompt on both sides."""
    pairs = [Pair(row, f"p{row // 2}", str(row), "b") for row in range(4000)]
    train, held = split(pairs, holdout_fraction=0.1)
    assert (train, held) == split(pairs, holdout_fraction=0.1)
    assert 300 < len(held) < 500
    assert sorted(train + held) == list(range(4000))
    assert not {row // 2 for row in train} & {row // 2 for row in held}
    assert split(pairs, holdout_fraction=0.1, seed=1)[1] != held
    assert split(pairs[::-1], holdout_fraction=0.1)[1] == held[::-1]
    assert split(pairs, holdout_fraction=0.0)[1] == []


def test_split_by_file(write_jsonl: Write) -> None:
    held = write_jsonl([TEXT], "held.jsonl")
    assert split([Pair(0, "q", "a", "b")], eval_data=str(held)) == ([0], [0])


def test_transcripts_that_are_almost_right(write_jsonl: Callable[..., Path]) -> None:
    """Stripped texts, texts with a preamble and texts that end with the human are read. Texts without an answer are
    dropped and counted."""
    good = {side: f"\n\nHuman: hi\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    rows = [
        {side: text.lstrip() for side, text in good.items()},
        {side: "Be kind." + text for side, text in good.items()},
        {"chosen": good["chosen"] + "s\n\nHuman: thanks", "rejected": good["rejected"]},
        dict.fromkeys(good, "\n\nHuman: hi"),
    ]
    data = load_pairs(str(write_jsonl(rows)))
    turn = "\n\nHuman: hi\n\nAssistant:"
    assert [pair.prompt for pair in data.pairs] == [turn, "Be kind." + turn, turn]
    assert [pair.chosen for pair in data.pairs] == [" chosen", " chosen", " chosens"]
    assert data.dropped == {"human turn at the end cut, kept": 1, "transcript without an assistant's turn": 1}
    assert data.transcripts


def test_messages_with_more_than_text(write_jsonl: Callable[..., Path]) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}], "name": None}
    prompt = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    rows = [
        {"prompt": prompt, "chosen": [call], "rejected": "no", "tools": [{"name": "f"}]},
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "a", "rejected": "b"},
    ]
    data = load_pairs(str(write_jsonl(rows)))
    (pair,) = data.pairs
    assert pair.prompt == [{"role": "user", "content": "hi"}]
    assert pair.chosen == {key: value for key, value in call.items() if value is not None or key == "content"}
    assert (pair.rejected, pair.options) == ("no", {"tools": [{"name": "f"}]})
    assert data.dropped == {"a content part of type 'image': expected text parts": 1}
    with pytest.raises(ValueError, match="line 1: field 'tools': expected messages with it"):
        load_pairs(str(write_jsonl([{"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{"name": "f"}]}])))
