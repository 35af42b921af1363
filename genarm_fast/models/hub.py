"""Where the files of a model are: in a folder, in a repository of the hub, or in the hub's cache."""

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
OPTIONS = ("revision", "cache_dir", "token")  # of transformers' `from_pretrained`: how files of a repository are had


class Repository(str):
    """A repository that the hub answers for: its id, and what all who read its files are told of it.

    options: `OPTIONS` as far as given, and the subfolder that a model is in. Libraries that keep its name get
    `str(...)` of it: options may hold a token.
    """

    options: dict[str, Any]

    def __new__(cls, name: str, options: dict[str, Any]) -> Repository:
        made = super().__new__(cls, name)
        made.options = options
        return made


def hub_options(source: Source) -> dict[str, Any]:
    """What reading a file of this source takes beside its name; nothing for a folder."""
    return source.options if isinstance(source, Repository) else {}


def locate(
    what: str, source: Source, *, revision: str | None = None, cache_dir: Any = None, token: Any = None
) -> Source:
    """`source` if it is a folder, a `Repository` if the hub answers for it, else its folder in the hub's cache.

    One request decides: out of the hub's reach, huggingface_hub tries for 23 s for every file that is not in its cache.
    revision, cache_dir and token are those of transformers' `from_pretrained`.

    Raises:
        FileNotFoundError: it is nowhere. The message names it by `what`.
        ValueError: it is a file.
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
        return found  # a repository without that file, such as an adapter's
    except Exception as error:  # of httpx or httpx2, by the version of huggingface_hub
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


def within(place: Source, subfolder: str) -> Source | None:
    """The part of a folder or repository that a model is in, as transformers' `subfolder` means it; None: not there."""
    if os.path.isdir(place):
        folder = os.path.join(place, subfolder)
        return folder if os.path.isdir(folder) else None
    part = Repository(os.fspath(place), hub_options(place) | {"subfolder": subfolder})
    return part if any(find_file(part, name) for name in CONFIGS) else None


def adapter_folder(place: Source) -> Source:
    """A folder as it is; of a repository, the folder in the hub's cache with all that an adapter has.

    PEFT's own way there misses a subfolder where the hub is out of reach.
    """
    if os.path.isdir(place):
        return place
    found = [find_file(place, name) for name in (*ADAPTER_FILES, "genarm.json")]
    return next((path.parent for path in found if path is not None), place)


def _refusal(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such repository, or not for this account"
    if isinstance(error, HFValidationError):
        return f"is no hub id: {text}"
    return f"the hub answered: {text}" if isinstance(error, HfHubHTTPError) else f"the hub can't be reached: {text}"


def find_file(source: Source, name: str) -> Path | None:
    """A file of a local folder or of a hub repository, None where it has none."""
    if os.path.isdir(source):
        path = Path(source, name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(os.fspath(source), name, **hub_options(source)))
    except (EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return None
