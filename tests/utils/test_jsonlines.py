"""Damaged files of JSON lines are refused with the file's name and the line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re

import pytest

from genarm_fast.utils.jsonlines import loads, read_objects

WHOLE = gzip.compress(b"".join(b'{"a": "%d"}\n' % i for i in range(20_000)), mtime=0)


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


@pytest.mark.parametrize("content", [WHOLE[:-200], WHOLE[:-4], flipped(WHOLE), b'{"a": 1}\n', WHOLE[:1]])
def test_compressed_files_that_are_no_whole_ones(tmp_path, content):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path)) + r" line \d+: expected (whole gzip data|a JSON object)"):
        list(read_objects(path))


def test_compressed_data_under_another_name_and_deep_json(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(WHOLE)
    with pytest.raises(ValueError, match=r"rows\.jsonl line 1: expected a JSON object .* got gzip data"):
        list(read_objects(tmp_path / "rows.jsonl"))
    (tmp_path / "deep.jsonl").write_text('{"a": 1}\n{"a": ' + "[" * 200_000 + "\n")
    with pytest.raises(ValueError, match=r"deep\.jsonl line 2: expected a JSON object"):
        list(read_objects(tmp_path / "deep.jsonl"))


def test_a_line_without_an_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("genarm_fast.utils.jsonlines.MAX_LINE_BYTES", 100)
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": "' + "x" * 86 + '"}\n')
    assert len(list(read_objects(tmp_path / "rows.jsonl"))) == 2
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n{"a": "' + "x" * 10**6)
    with pytest.raises(ValueError, match=r"rows\.jsonl line 3: expected at most 100 bytes"):
        list(read_objects(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (bz2.compress(b"{}"), "bzip2 data"),
        (lzma.compress(b"{}"), "xz data"),
        (b"\x28\xb5\x2f\xfd\x04\x00\x01\x00\x00", "Zstandard data"),
        (b"PK\x03\x04....", "a zip archive"),
        (b"PAR1....", "a Parquet table"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16 text"),
        (b'[{"a": 1}]', "a JSON array"),
    ],
)
def test_files_of_other_kinds_are_called_what_they_are(tmp_path, content, what):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"rows\.jsonl line 1: expected a JSON object a line, .* got {what}"):
        list(read_objects(tmp_path / "rows.jsonl"))


def test_a_key_that_is_there_twice(tmp_path):
    """`json` silently takes the last value, at any depth."""
    for line in ('{"a": 1, "b": 2, "a": 1}', '{"c": [{"a": 1, "a": 2}]}'):
        assert "a" in str(json.loads(line))
        (tmp_path / "rows.jsonl").write_text('{"a": 0}\n' + line + "\n")
        with pytest.raises(
            ValueError, match=r"rows\.jsonl line 2: expected a JSON object, .*the key 'a' is there twice"
        ):
            list(read_objects(tmp_path / "rows.jsonl"))
    assert loads('{"a": {"a": [1]}}') == {"a": {"a": [1]}}
