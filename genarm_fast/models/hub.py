"""Find the files of a model: in a folder, in a repository of the hub, or in the hub's cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

Source = str | os.PathLike[str]
CONFIGS = ["config.json", "adapter_config.json"]
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
OPTIONS = ("revision", "cache_dir", "token")  # options of transformers' `from_pretrained` for fetching files


class Repository(str):
    """A repository that the hub answers for: its id, and the options that every reader of its files needs.

    options: those of `OPTIONS` that were given, and the subfolder that a model is in. Libraries that keep the name get
    `str(...)` of the repository, because the options may hold a token.
    """

    options: dict[str, Any]

    def __new__(cls, name: str, options: dict[str, Any]) -> Repository:
        made = super().__new__(cls, name)
        made.options = options
        return made


def hub_options(source: Source) -> dict[str, Any]:
    """Return the options needed to read a file of this source; {} for a folder."""
    return source.options if isinstance(source, Repository) else {}


def locate(
    what: str, source: Source, *, revision: str | None = None, cache_dir: Any = None, token: Any = None
) -> Source:
    """Return `source` if it is a folder, a `Repository` if the hub answers for it, else its folder in the hub's cache.

    One request decides. If the hub is out of reach, huggingface_hub would try for 23 s for every file that is not in
    its cache. revision, cache_dir and token are those of transformers' `from_pretrained`.

    Raises:
        FileNotFoundError: `source` is found nowhere. The message begins with `what`.
        ValueError: `source` is a file.
    """
    name = os.fspath(source)
    if os.path.isdir(name):
        return source
    if os.path.isfile(name):
        raise ValueError(f"{what}={name!r}: expected a folder or a hub id, got a file: say its folder")
    if os.path.isabs(name):
        raise FileNotFoundError(f"{what}={name!r}: no such folder")
    options = {"revision": revision, "cache_dir": cache_dir, "token": token}
    found = Repository(name, {option: value for option, value in options.items() if value is not None})
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIGS[0], revision=revision), token=token)
    except EntryNotFoundError:
        return found  # a repository without that file, such as an adapter's repository
    except Exception as error:  # an error of httpx or of httpx2, depending on the version of huggingface_hub
        try:
            return snapshot_download(
                name, revision=revision, cache_dir=cache_dir, allow_patterns=CONFIGS, local_files_only=True
            )
        except (LocalEntryNotFoundError, HFValidationError):
            raise FileNotFoundError(
                f"{what}={name!r}: expected a folder or a hub id, but it is neither a folder here nor in the hub's"
                f" cache, and {_refusal(error)}"
            ) from error
    return found


def subfolder_of(location: Source, subfolder: str) -> Source | None:
    """Return the part of a folder or repository in transformers' `subfolder`; None if it is not there."""
    if os.path.isdir(location):
        folder = os.path.join(location, subfolder)
        return folder if os.path.isdir(folder) else None
    part = Repository(os.fspath(location), hub_options(location) | {"subfolder": subfolder})
    return part if any(find_file(part, name) for name in CONFIGS) else None


def adapter_folder(location: Source) -> Source:
    """Return a folder as it is, and for a repository its folder in the hub's cache, with all files of an adapter.

    PEFT's own search misses a subfolder when the hub is out of reach.
    """
    if os.path.isdir(location):
        return location
    found = [find_file(location, name) for name in (*ADAPTER_FILES, "genarm.json")]
    return next((path.parent for path in found if path is not None), location)


def _refusal(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such repository, or not for this account"
    if isinstance(error, HFValidationError):
        return f"is no hub id: {text}"
    return f"the hub answered: {text}" if isinstance(error, HfHubHTTPError) else f"the hub can't be reached: {text}"


def find_file(source: Source, name: str) -> Path | None:
    """Return the path of a file of a local folder or hub repository, or None if it has no such file."""
    if os.path.isdir(source):
        path = Path(source, name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(os.fspath(source), name, **hub_options(source)))
    except (EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return None
