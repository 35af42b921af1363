"""Reading of JSON lines and writing of strict JSON, with errors that name the file and the line."""

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

MAX_LINE_BYTES = 1 << 26  # most bytes of a line, enough for ten million token ids
KINDS_BY_FIRST_BYTES = {  # first bytes of files that are not JSON lines, and what such files are
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
    """Iterate over (line number from 1, object) for every line that is not blank. `.gz` files are unpacked.

    Raises ValueError for a line that is too long or not a JSON object, and for a file without any object. A compressed
    file that is cut off or damaged raises it too.
    """
    empty = True
    for number, line in read_lines(path):
        yield number, parsed(path, number, line)
        empty = False
    if empty:
        raise ValueError(f"{path}: expected one JSON object a line, found none")


def read_lines(path: str | Path, name: str | Path | None = None) -> Iterator[tuple[int, bytes]]:
    """Iterate over (line number from 1, bytes) for every line that is not blank.

    name: the file's name in errors; default: its path. Raises ValueError for a line that is too long, for other kinds
    of files, and for a compressed file that is cut off or damaged.
    """
    name, number = path if name is None else name, 0
    with _open(path) as file:
        try:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if number == 1 and (kind := _kind(line)):
                    raise ValueError(f"{name} line 1: expected a JSON object a line, plain or in .gz, got {kind}")
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"{name} line {number}: expected at most {MAX_LINE_BYTES:,} bytes")
                if not line.isspace():
                    yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{name} line {number + 1}: expected whole gzip data: {error}") from error


def parsed(path: str | Path, number: int, line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line. Raises ValueError, with file and line, if the line is not one."""
    try:
        row = loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))  # on Windows, files may begin with a mark
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} line {number}: expected a JSON object, got {line.strip()[:40]!r}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path} line {number}: expected a JSON object, got {line.strip()[:40]!r}")
    return row


def loads(text: str) -> Any:
    """Parse JSON as `json.loads` does, but raise ValueError for a key that an object has twice."""
    return json.loads(text, object_pairs_hook=_without_repeated_keys)


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"the key {repeated(pairs)!r:.80} is there twice")
    return row


def repeated(pairs: list[tuple[str, Any]]) -> str:
    """Return the first key that is there more than once."""
    counts = Counter(key for key, _ in pairs)
    return next(key for key, count in counts.items() if count > 1)


@contextlib.contextmanager
def located(path: str | Path, number: int) -> Iterator[None]:
    """Put file and line before the message of a TypeError or ValueError that the block raises."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} line {number}: {error}") from error


def dumps(value: Any) -> str:
    """Return a value as one line of strict JSON. Numbers that JSON lacks (a log-probability of -inf) become null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(finite(value), ensure_ascii=False, allow_nan=False)


def finite(value: Any) -> Any:
    """Return a copy with None in the place of numbers that JSON lacks: NaN, inf and -inf."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _kind(line: bytes) -> str | None:
    return next((kind for begin, kind in KINDS_BY_FIRST_BYTES.items() if line.startswith(begin)), None)


def _open(path: str | Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if str(path).endswith(".gz") else open(path, "rb")
