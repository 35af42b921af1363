"""The fingerprint of a base from its files, without loading it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig

from genarm_fast.models.files import INDICES, read_object
from genarm_fast.models.fingerprint import ROWS, fingerprint
from genarm_fast.models.hub import Source
from genarm_fast.models.sizes import kind_of

WHOLE = "model.safetensors"  # comes before shards and their index


def checkpoint_fingerprint(base: Source) -> str | None:
    """`fingerprint` of a folder's checkpoint, from the first rows of each matrix; None where that can't be told.

    A hub id, a quantised checkpoint, and one whose files name tensors otherwise than the model has none.
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
    """The files that transformers loads: others may lie there, such as variants, an adapter's, or another format's."""
    index = read_object("base", folder, INDICES[0]).get("weight_map", {})
    names = [WHOLE] if (folder / WHOLE).is_file() else sorted(set(index.values()))
    return [folder / name for name in names if (folder / name).is_file()]


class _FirstRows(nn.Module):
    """Stands for a model before `fingerprint`: the names of its matrices, and their first rows from the files."""

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
                yield name, file.get_slice(name)[:ROWS]
