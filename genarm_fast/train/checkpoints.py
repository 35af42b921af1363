"""Checkpoints of a run: sealed once they are on the disk, and trusted only while the seal holds."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from pathlib import Path

from genarm_fast.train.config import TrainConfig
from genarm_fast.train.files import read_json, with_keys, write_json

# This file is written last: a checkpoint without it was cut off by a kill.
COMPLETE = "complete.json"
BLOCK = 1 << 20


def checkpoints(config: TrainConfig) -> Path:
    """Return the folder that holds checkpoint-N folders and nothing else."""
    return config.folder / "checkpoints"


def seal(folder: Path) -> None:
    """Record the size and the SHA-256 of each file of a checkpoint, after all of them are on the disk."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)
    write_json(folder / COMPLETE, {"files": _digests(folder)})
    _sync(folder / COMPLETE)
    _sync(folder)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint, or None if there never was one.

    Checkpoints that a kill cut off are removed. Damaged ones are skipped with a warning.

    Raises:
        ValueError: all checkpoints are damaged. To begin anew would silently give other weights.
    """
    sealed = {}
    for path in folder.glob("checkpoint-*"):
        if not path.is_dir() or not path.name.removeprefix("checkpoint-").isdecimal():
            continue  # the folder's name is no checkpoint's
        if (path / COMPLETE).is_file():
            sealed[int(path.name.removeprefix("checkpoint-"))] = path
        else:
            shutil.rmtree(path)
    for number in sorted(sealed, reverse=True):
        damage = _damage(sealed[number])
        if damage is None:
            return sealed[number]
        warnings.warn(f"{sealed[number]}: {damage}: passed over", stacklevel=2)
    if sealed:
        raise ValueError(f"{folder}: expected a whole checkpoint, all are damaged: remove the folder to train anew")
    return None


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a sealed checkpoint, or None."""
    try:
        expected = with_keys(folder / COMPLETE, read_json(folder / COMPLETE, "files")["files"])
        found = _digests(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{COMPLETE} can't be read ({error})"
    if found == expected:
        return None
    names = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    return f"{', '.join(names)} changed since it was written"


def _digests(folder: Path) -> dict[str, list[int | str]]:
    """Return size and SHA-256 of each file, by its path in the folder."""
    found: dict[str, list[int | str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != COMPLETE:
            with open(path, "rb") as file:
                state = hashlib.sha256()
                for block in iter(lambda: file.read(BLOCK), b""):
                    state.update(block)
            found[str(path.relative_to(folder))] = [path.stat().st_size, state.hexdigest()]
    return found


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
