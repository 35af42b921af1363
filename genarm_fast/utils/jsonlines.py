"""JSON lines in and strict JSON out, with errors that name the file and the line."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast


def read_objects(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) for every line that is not blank; `.gz` files are unpacked.

    Raises ValueError for a line that is no JSON object, a compressed file that is cut off or damaged, or if the file
    holds no object.
    """
    empty = True
    with _open(path) as file:
        for number, line in _lines(path, file):
            if not line.strip():
                continue
            with located(path, number):
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))  # Windows marks files so
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"expected a JSON object, got {line.strip()[:40]!r}: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"expected a JSON object, got {line.strip()[:40]!r}")
            yield number, row
            empty = False
    if empty:
        raise ValueError(f"{path}: expected one JSON object a line, found none")


def _lines(path: str | Path, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1."""
    number = 0
    try:
        for number, line in enumerate(file, 1):
            yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} line {number + 1}: expected whole gzip data: {error}") from error


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
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _open(path: str | Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if str(path).endswith(".gz") else open(path, "rb")
