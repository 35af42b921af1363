"""The files of a model folder, checked before anything is built from them.

A folder may come from anywhere: cut off while it was copied, edited by hand, or made to do harm. Each fault is one
ValueError of one form: the member, the file, what was expected.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from genarm_fast.models.hub import Source, find_file
from genarm_fast.utils.disk import DISK_FULL_ERRNOS
from genarm_fast.utils.jsonlines import repeated

MIB = 1 << 20
JSON_LIMITS = {  # largest sizes in bytes; the largest files of the hub have a tenth of them
    "config.json": 16 * MIB,
    "generation_config.json": 16 * MIB,
    "adapter_config.json": 16 * MIB,
    "genarm.json": 16 * MIB,
    "tokenizer_config.json": 64 * MIB,
    "special_tokens_map.json": 64 * MIB,
    "added_tokens.json": 64 * MIB,
    "model.safetensors.index.json": 256 * MIB,
    "pytorch_model.bin.index.json": 256 * MIB,
}
# The file that training writes. All other files are read by libraries, which take the last of two equal keys.
TRAINING_RECORD_FILE = "genarm.json"
# Deepest nesting of objects and arrays. Files of the hub have at most 10 levels, and libraries recurse over them.
MOST_NESTED = 100
# Ends of the names of files that libraries read.
LIBRARY_FILE_ENDINGS = (".json", ".jinja", ".model", ".txt", ".safetensors", ".bin", ".tiktoken")
TEMPLATES = ("*.jinja", "additional_chat_templates/*.jinja")
MOST_TEMPLATE = MIB  # bytes; the longest templates of the hub have 20 kB
WEIGHTS = ("*.safetensors", "*.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
MOST_TOKENIZER = 512 * MIB  # bytes of tokenizer.json; the largest files of the hub have 35 MB
# A setting of a config is a size if its name ends with one of these words or begins with "n_".
SIZE_NAME_ENDINGS = ("layers", "layer", "experts", "heads", "size", "dim", "rank")


def read_object(member: str, source: Source, name: str) -> dict[str, Any]:
    """Return a JSON object from a file of a folder or hub repository, or {} if there is no such file.

    Raises:
        ValueError: something that is no regular file, a file that is too large, or one that holds no JSON object in
            UTF-8.
    """
    if os.path.isdir(source):
        _check_regular(member, Path(source, name))
    path = find_file(source, name)
    return {} if path is None else _parsed(f"{member}: {path}", path, JSON_LIMITS[name])


def check_files(member: str, source: Source) -> None:
    """Raises ValueError for a folder entry that is no regular file, JSON without an object, and safetensors cut short.

    Of a hub repository only the JSON files are checked, since its weights are not here yet.
    """
    if os.path.isdir(source):
        for path in (*Path(source).iterdir(), *Path(source).glob(TEMPLATES[1])):
            if path.name.endswith(LIBRARY_FILE_ENDINGS):
                _check_regular(member, path)
    objects = {name: read_object(member, source, name) for name in JSON_LIMITS}
    _check_code(f"{member}: {Path(source, 'config.json')}", objects["config.json"])
    if not os.path.isdir(source):
        return
    folder = Path(source)
    for path in (path for pattern in TEMPLATES for path in folder.glob(pattern)):
        _check_template(f"{member}: {path}", path)
    largest = 0
    quantized = any(f"{how}_config" in str(objects["config.json"]) for how in ("quantization", "compression"))
    for path in _weight_files(member, folder, objects):
        if path.suffix == ".safetensors":
            with refusing(f"{member}: {path}", "a whole safetensors file"), safe_open(path, "pt") as file:
                tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
                largest = max([largest, *(max(tensor.get_shape(), default=0) for tensor in tensors.values())])
            for name, tensor in tensors.items():
                if name.endswith("weight") and not quantized and "F" not in tensor.get_dtype():
                    kind = tensor.get_dtype()
                    raise ValueError(f"{member}: {path}: {name} is {kind}: expected floating-point numbers")
    check_sizes(f"{member}: {folder / 'config.json'}", objects["config.json"], weight_bytes(folder))
    _check_ranks(f"{member}: {folder / 'adapter_config.json'}", objects["adapter_config.json"], largest)


def _check_code(what: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError for a config that names a repository of kernels: transformers would fetch and run them."""
    for name, value in config.items():
        if name.endswith(("_implementation", "_implementation_internal")) and "/" in str(value):
            raise ValueError(
                f"{what}: {name}={value!r:.60}: expected none that brings code of its own; the caller may pass it"
            )
        if isinstance(value, Mapping):
            _check_code(f"{what}: {name}", value)


def weight_bytes(folder: Path) -> int:
    """Return the bytes of all weight files in a folder."""
    return sum(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern))


def check_sizes(what: str, config: Mapping[str, Any], limit: int) -> None:
    """Raises ValueError for a size in a config that no checkpoint of `limit` bytes can have, such as 10^9 layers.

    A layer has more than a byte of weights, and so has a row of a matrix.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_sizes(f"{what}: {name}", value, limit)
        elif (
            isinstance(value, int) and value > limit > 0 and (name.startswith("n_") or name.endswith(SIZE_NAME_ENDINGS))
        ):
            raise ValueError(f"{what}: {name}={value}: expected at most {limit}, the bytes of its weights")


@contextmanager
def refusing(what: str, expected: str) -> Iterator[None]:
    """Turn any error that a library raises over a file into a ValueError. MemoryError and interrupts pass through."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # The Rust code of tokenizers panics over some files, with an exception that is no subclass of Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        # The disk is full, for example for a temporary file. Nothing is wrong with the model's file.
        if getattr(error, "errno", None) in DISK_FULL_ERRNOS:
            raise
        raise ValueError(f"{what}: expected {expected}{_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return a library's message in one line. Messages about pickles are replaced: they advise to load the file."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "; it brings Python code of its own, which runs only with trust_remote_code"
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text:
        return ", got a pickle of more than tensors"
    if isinstance(error, KeyError):  # the text of a KeyError is the key alone
        return f", found nothing for {text[:300]}"
    return f": {text[:300]}" if text else f", got {type(error).__name__}"


def _check_ranks(what: str, config: Mapping[str, Any], largest: int) -> None:
    """Raises ValueError for a rank that no matrix of the adapter has.

    PEFT takes memory for the rank before it reads the matrices.
    """
    ranks = config.get("rank_pattern") or {}
    for rank in (config.get("r"), *(ranks.values() if isinstance(ranks, Mapping) else ())):
        if isinstance(rank, int) and rank > largest > 0:
            raise ValueError(f"{what}: rank {rank}: expected at most {largest}, the longest side of its matrices")


def _check_regular(member: str, path: Path) -> None:
    if (path.exists() or path.is_symlink()) and not path.is_file():
        raise ValueError(f"{member}: {path}: expected a file, got {_kind(path)}")


def _kind(path: Path) -> str:
    return "a folder" if path.is_dir() else "a link to nothing" if not path.exists() else "a pipe, socket or device"


def _parsed(what: str, path: Path, limit: int) -> dict[str, Any]:
    if (size := path.stat().st_size) > limit:
        raise ValueError(f"{what}: expected a JSON object of at most {limit} bytes, got {size}")
    expected = "a JSON object in UTF-8 without a byte order mark"
    twice: list[str] = []
    with refusing(what, expected):
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=lambda pairs: _last(pairs, twice))
    if twice and path.name == TRAINING_RECORD_FILE:
        raise ValueError(f"{what}: the key {twice[0]!r:.80} is there twice: expected it once")
    if twice:
        warnings.warn(f"{what}: the key {twice[0]!r:.80} is there twice: the last one counts", stacklevel=2)
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected {expected}, got {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(MOST_NESTED):
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
        level = [item for item in level if isinstance(item, (dict, list))]
    if level:
        raise ValueError(f"{what}: expected a JSON object of at most {MOST_NESTED} levels, got more")
    return value


def _last(pairs: list[tuple[str, Any]], twice: list[str]) -> dict[str, Any]:
    """Return the pairs as a dict in which the last of equal keys counts, as in `json`, transformers and PEFT.

    A key that repeats is added to `twice`.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        twice.append(repeated(pairs))
    return row


def _check_template(what: str, path: Path) -> None:
    expected = f"a Jinja template of at most {MOST_TEMPLATE} bytes, in UTF-8 without a byte order mark"
    if (size := path.stat().st_size) > MOST_TEMPLATE:
        raise ValueError(f"{what}: expected {expected}, got {size}")
    with refusing(what, expected):
        if path.read_bytes().decode("utf-8").startswith("\ufeff"):
            raise ValueError("it begins with such a mark")


def blame_tokenizer(member: str, folder: Path) -> str:
    """Return the path of the tokenizer's file to blame, after the tokenizer could not be loaded.

    The JSON files are parsed again, so that a fault in them is raised as its own ValueError.
    """
    for name in ("tokenizer.json", "vocab.json"):
        if (folder / name).is_file():
            _parsed(f"{member}: {folder / name}", folder / name, MOST_TOKENIZER)
    return next((str(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()), str(folder))


def _weight_files(member: str, folder: Path, objects: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Return the weight files of a folder. Raises ValueError for a shard that an index names and that is not there."""
    for index in INDICES:
        named = objects[index].get("weight_map", {})
        if named and not isinstance(objects[index].get("metadata"), Mapping):  # transformers reads the metadata
            raise ValueError(f"{member}: {folder / index}: expected an object 'metadata' in it")
        if not isinstance(named, Mapping) or not all(isinstance(name, str) for name in named.values()):
            raise ValueError(f"{member}: {folder / index}: expected a weight_map from tensors to files")
        for name in sorted(set(named.values())):
            if Path(name).name != name or not (folder / name).is_file():
                raise ValueError(f"{member}: {folder / index}: expected the file {name!r} beside it")
    return sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
