"""Hashes that tell whether a line was made by the same request on the same models."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MODEL_FILES = {".json", ".jinja", ".model", ".txt", ".safetensors", ".bin"}
BLOCK = 1 << 16
BLOCKS = 64


def digest(value: Any) -> str:
    """A short hash of JSON data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def identity(source: str) -> str:
    """A hub id as it is; for a folder a hash of its files' content, so that it may move but not be trained anew.

    Files above 4 MiB are sampled at 64 places: training moves every weight, and reading 100 GB would take minutes.
    """
    folder = Path(source)
    if not folder.is_dir():
        return source
    state = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in MODEL_FILES and path.is_file():
            size = path.stat().st_size
            state.update(f"{path.name}:{size}:".encode())
            with open(path, "rb") as file:
                for at in range(0, size, max(BLOCK, size // BLOCKS)):
                    file.seek(at)
                    state.update(file.read(BLOCK))
    return state.hexdigest()[:16]
