"""Hashes that show whether a line was made by the same request on the same models."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MODEL_FILES = {".json", ".jinja", ".model", ".txt", ".safetensors", ".bin"}
BLOCK = 1 << 16
BLOCKS = 64


def digest(value: Any) -> str:
    """Return a short hash of JSON data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def identity(source: str) -> str:
    """Return a hub id as it is, and for a folder a hash of its files' content.

    A folder that is moved keeps its hash; one that is trained anew does not. Files above 4 MiB are sampled at 64
    places: training changes every weight, and reading 100 GB would take minutes.
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
