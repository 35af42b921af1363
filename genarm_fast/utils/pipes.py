"""Pipes: inputs that can be read only once."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any


def is_pipe(path: Path) -> bool:
    """Whether a path can be read only once. Raises ValueError for devices, some of which never end."""
    if not path.exists() or path.is_file() or path.is_dir():
        return False
    if path.is_block_device() or (path.is_char_device() and not os.path.samefile(path, "/dev/stdin")):
        raise ValueError(f"{path}: expected a file or a pipe")
    return True


def copied(path: Path) -> Any:
    """Return a temporary file with the bytes of a pipe. It lives as long as this object; `name` is its path."""
    copy = tempfile.NamedTemporaryFile(prefix="genarm-fast-input-", suffix=path.suffix)  # noqa: SIM115
    with open(path, "rb") as pipe:
        shutil.copyfileobj(pipe, copy)
    copy.flush()
    return copy
