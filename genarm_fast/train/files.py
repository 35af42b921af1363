"""Files that are written whole or not at all, in a folder that only one process writes."""

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
    """Yield a path to write to. Its file replaces `path` if the block succeeds."""
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
    """Return the object that `write_json` wrote. Raises ValueError for a damaged file or a missing key."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected the JSON object that a run wrote: {error}") from error
    return with_keys(path, value, *keys)


def with_keys(path: Path, value: Any, *keys: str) -> dict[str, Any]:
    """Return a value that is an object with these keys. Raises ValueError for any other value."""
    if not isinstance(value, dict) or not set(keys) <= set(value):
        raise ValueError(f"{path}: expected a JSON object with {', '.join(keys)}, as a run wrote it, got {value!r:.60}")
    return value


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, made if missing, against other processes that call this. A killed process releases its lock.

    A folder that was made here and is still empty at the end is removed.

    Raises:
        BlockingIOError: another process holds the lock.
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
