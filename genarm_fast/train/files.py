"""Files that are there whole or not at all, in a folder that one process writes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from genarm_fast.utils.disk import resumable

PARTIAL = "partial-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which takes the place of `path` if the block succeeds."""
    partial = path.with_name(PARTIAL + path.name)
    try:
        with resumable(path):
            yield partial
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The object that `write_json` wrote. Raises ValueError where the file is damaged, or lacks one of the keys."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected the JSON object that a run wrote: {error}") from error
    return with_keys(path, value, *keys)


def with_keys(path: Path, value: Any, *keys: str) -> dict[str, Any]:
    """A value that is an object with these keys. Raises ValueError for any other."""
    if not isinstance(value, dict) or not set(keys) <= set(value):
        raise ValueError(f"{path}: expected a JSON object with {', '.join(keys)}, as a run wrote it, got {value!r:.60}")
    return value


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a folder, made if missing, from other processes that ask for it; a kill gives it back.

    A folder that was made for this and is still empty in the end goes away again.

    Raises:
        BlockingIOError: another process has it.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BlockingIOError(f"{folder}: another running process trains there") from None
    finally:
        if new:
            with suppress(OSError):
                folder.rmdir()
        os.close(handle)
