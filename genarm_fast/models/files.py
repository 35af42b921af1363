"""The files of a model folder, checked before anything is built from them.

A folder may come from anywhere: cut off while it was copied, edited by hand, or made to do harm. Each fault is one
ValueError in one form: the member, the file, what was expected.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from genarm_fast.models.hub import Source, find_file

MIB = 1 << 20
JSON_LIMITS = {  # largest sizes; the largest of the hub are a tenth of these
    "config.json": 16 * MIB,
    "generation_config.json": 16 * MIB,
    "adapter_config.json": 16 * MIB,
    "genarm.json": 16 * MIB,
    "tokenizer_config.json": 64 * MIB,
    "special_tokens_map.json": 64 * MIB,
    "added_tokens.json": 64 * MIB,
    "model.safetensors.index.json": 256 * MIB,
}
OTHERS = (  # files that libraries read by themselves
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "model.safetensors",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "adapter_model.bin",
)
WEIGHTS = ("*.safetensors", "*.bin")
INDEX = "model.safetensors.index.json"
COUNTS = ("layers", "layer", "experts", "heads", "size", "dim", "rank")  # how names of sizes end, or "n_" begins


def read_object(member: str, source: Source, name: str) -> dict[str, Any]:
    """A JSON object of a folder or hub repository, {} where it has no such file.

    Raises:
        ValueError: it is no file, too large, or no JSON object in UTF-8.
    """
    _check_regular(member, source, name)
    path = find_file(source, name)
    return {} if path is None else _parsed(f"{member}: {path}", path, JSON_LIMITS[name])


def check_files(member: str, source: Source) -> None:
    """Raises ValueError for a file that is no file, a JSON file that holds no object, and safetensors cut short.

    A repository of the hub is checked as far as its JSON files go: its weights are not here yet.
    """
    for name in OTHERS:
        _check_regular(member, source, name)
    objects = {name: read_object(member, source, name) for name in JSON_LIMITS}
    if not os.path.isdir(source):
        return
    for path in _weight_files(member, Path(source), objects[INDEX]):
        if path.suffix == ".safetensors":
            with refusing(f"{member}: {path}", "a whole safetensors file"), safe_open(path, "pt") as file:
                file.keys()
    check_sizes(f"{member}: {Path(source, 'config.json')}", objects["config.json"], weight_bytes(Path(source)))


def weight_bytes(folder: Path) -> int:
    """Bytes of all weights in a folder."""
    return sum(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern))


def check_sizes(what: str, config: Mapping[str, Any], limit: int) -> None:
    """Raises ValueError for a size in a config that no checkpoint of so many bytes can have, such as 10^9 layers.

    A layer has more than a byte of weights, and so has a row of a matrix.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_sizes(f"{what}: {name}", value, limit)
        elif isinstance(value, int) and value > limit > 0 and (name.startswith("n_") or name.endswith(COUNTS)):
            raise ValueError(f"{what}: {name}={value}: expected at most {limit}, the bytes of its weights")


@contextmanager
def refusing(what: str, expected: str) -> Iterator[None]:
    """Turns whatever a library raises over a file into one ValueError; lack of memory and interrupts stay."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # The Rust of tokenizers panics over some files, with an exception of its own that is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: expected {expected}{_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What a library says, in one line. What it says of pickles is left out: it advises to load them all the same."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "; it brings Python code of its own, which runs only with trust_remote_code"
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text:
        return ", got a pickle of more than tensors"
    return f": {text[:300]}" if text else f", got {type(error).__name__}"


def _check_regular(member: str, source: Source, name: str) -> None:
    path = Path(source, name)
    if os.path.isdir(source) and (path.exists() or path.is_symlink()) and not path.is_file():
        raise ValueError(f"{member}: {path}: expected a file, got {_kind(path)}")


def _kind(path: Path) -> str:
    return "a folder" if path.is_dir() else "a link to nothing" if not path.exists() else "a pipe, socket or device"


def _parsed(what: str, path: Path, limit: int) -> dict[str, Any]:
    if (size := path.stat().st_size) > limit:
        raise ValueError(f"{what}: expected a JSON object of at most {limit} bytes, got {size}")
    expected = "a JSON object in UTF-8 without a byte order mark"
    with refusing(what, expected):
        value = json.loads(path.read_bytes().decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected {expected}, got {type(value).__name__}")
    return value


def _weight_files(member: str, folder: Path, index: Mapping[str, Any]) -> list[Path]:
    """The safetensors of a folder, and the shards that its index names, which must be there."""
    named = index.get("weight_map", {})
    if not isinstance(named, Mapping) or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{member}: {folder / INDEX}: expected a weight_map from tensors to files")
    for name in sorted(set(named.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{member}: {folder / INDEX}: expected the file {name!r} beside it")
    return sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
