"""The fingerprint of a base, computed from its files without loading the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig

from genarm_fast.models.files import INDICES, read_object
from genarm_fast.models.fingerprint import SAMPLED_ROWS, fingerprint
from genarm_fast.models.hub import Source
from genarm_fast.models.sizes import kind_of

SINGLE_WEIGHTS_FILE = "model.safetensors"  # transformers prefers this file to shards and their index


def checkpoint_fingerprint(base: Source) -> str | None:
    """Return the `fingerprint` of a folder's checkpoint, from the first rows of each matrix; None if unknown.

    It is unknown for a hub id, a quantised checkpoint, and files that name tensors differently from the model.
    """
    folder = Path(base)
    if not folder.is_dir() or not (files := _loaded(folder)):
        return None
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        return None
    with torch.device("meta"):
        model = kind_of(config).from_config(config)
    rows = _FirstRows(model, files)
    return None if rows.lacking else fingerprint(rows)


def _loaded(folder: Path) -> list[Path]:
    """Return the files that transformers loads. The folder may hold others: variants, an adapter, or another format."""
    index = read_object("base", folder, INDICES[0]).get("weight_map", {})
    names = [SINGLE_WEIGHTS_FILE] if (folder / SINGLE_WEIGHTS_FILE).is_file() else sorted(set(index.values()))
    return [folder / name for name in names if (folder / name).is_file()]


class _FirstRows(nn.Module):
    """A stand-in for a model, for `fingerprint`: the names of its matrices, and their first rows from the files."""

    def __init__(self, model: nn.Module, files: Sequence[Path]) -> None:
        super().__init__()
        self.names = [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]
        self.files: dict[str, Path] = {}
        for path in files:
            with safe_open(path, "pt") as file:
                self.files.update(dict.fromkeys(file.keys(), path))
        self.lacking = [name for name in self.names if name not in self.files]

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        for name in self.names:
            with safe_open(self.files[name], "pt") as file:
                yield name, file.get_slice(name)[:SAMPLED_ROWS]
