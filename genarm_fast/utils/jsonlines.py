"""JSON lines in and strict JSON out, with errors that name the file and the line."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

LONGEST = 1 << 26  # bytes of a line: ten million token ids
KINDS = {  # how files begin that are no JSON lines, and what they are
    b"\x1f\x8b": "gzip data, whose names end with .gz",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet table",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"[": "a JSON array",
}


def read_objects(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) for every line that is not blank; `.gz` files are unpacked.

    Raises ValueError for a line that is no JSON object or too long for one, a compressed file that is cut off or
    damaged, or if the file holds no object.
    """
    empty = True
    for number, line in read_lines(path):
        yield number, parsed(path, number, line)
        empty = False
    if empty:
        raise ValueError(f"{path}: expected one JSON object a line, found none")


def read_lines(path: str | Path, name: str | Path | None = None) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) for every line that is not blank. name: of the file in errors, if not its path.

    Raises as `read_objects`.
    """
    name, number = path if name is None else name, 0
    with _open(path) as file:
        try:
            while line := file.readline(LONGEST + 1):
                number += 1
                if number == 1 and (kind := _kind(line)):
                    raise ValueError(f"{name} line 1: expected a JSON object a line, plain or in .gz, got {kind}")
                if len(line) > LONGEST:
                    raise ValueError(f"{name} line {number}: expected at most {LONGEST:,} bytes")
                if not line.isspace():
                    yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{name} line {number + 1}: expected whole gzip data: {error}") from error


def parsed(path: str | Path, number: int, line: bytes) -> dict[str, Any]:
    """The object of a line. Raises ValueError that names file and line where it is none."""
    try:
        row = loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))  # Windows marks files so
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} line {number}: expected a JSON object, got {line.strip()[:40]!r}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path} line {number}: expected a JSON object, got {line.strip()[:40]!r}")
    return row


def loads(text: str) -> Any:
    """As `json.loads`. Raises ValueError for a key that an object has twice, of which that would take the last one."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"the key {repeated(pairs)!r:.80} is there twice")
    return row


def repeated(pairs: list[tuple[str, Any]]) -> str:
    """The first key that an object has more than once."""
    counts = Counter(key for key, _ in pairs)
    return next(key for key, count in counts.items() if count > 1)


@contextlib.contextmanager
def located(path: str | Path, number: int) -> Iterator[None]:
    """Puts file and line before the message of a TypeError or ValueError from within."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} line {number}: {error}") from error


def dumps(value: Any) -> str:
    """One line of strict JSON. Numbers that JSON lacks (a log-probability of -inf) become null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(finite(value), ensure_ascii=False, allow_nan=False)


def finite(value: Any) -> Any:
    """The same with None in the place of numbers that JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _kind(line: bytes) -> str | None:
    return next((kind for begin, kind in KINDS.items() if line.startswith(begin)), None)


def _open(path: str | Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if str(path).endswith(".gz") else open(path, "rb")
