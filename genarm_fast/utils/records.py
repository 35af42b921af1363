"""Small JSON records in the cache folder, which processes share. Readers see whole and valid records alone."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

MAX_RECORD_BYTES = 1 << 20  # most bytes of a record; that of a model with 100 layers takes 4 kB


def cache_dir() -> Path:
    """Return the cache folder: $GENARM_FAST_CACHE, or ~/.cache/genarm_fast."""
    return Path(os.environ.get("GENARM_FAST_CACHE") or "~/.cache/genarm_fast").expanduser()


def read_record(kind: str, key: str) -> dict[str, Any] | None:
    """Return the record of a kind and a key; None if there is no record, or if it is not valid."""
    try:
        path = _path(kind, key)
        if path.stat().st_size > MAX_RECORD_BYTES:
            return None
        record = json.loads(path.read_bytes())
    except (OSError, RuntimeError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.get("key") == key else None


def write_record(kind: str, key: str, record: dict[str, Any]) -> None:
    """Write a record. Readers see the old one or the new one, never a part. Does nothing if it can't be written."""
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        path = _path(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"key": key, **record}, file)
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise


def _path(kind: str, key: str) -> Path:
    return cache_dir() / kind / f"{key}.json"
