"""Names of ARMs: given by callers, or made from paths. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

RESERVED = ("base", "ngram", "draft_model")  # names of the drafters that are not ARMs


def unique_names(given: Sequence[str | None], paths: Sequence[str | None]) -> list[str]:
    """Return one name for each ARM: its given name, else the last part of its path, numbered if that name repeats.

    given: one entry for each ARM; None if the caller gave no name. paths: one entry for each ARM; None for a loaded
    model, whose name is "arm".

    Raises:
        ValueError: a given name that is empty, used twice, or in `RESERVED`.
    """
    taken = [name for name in given if name is not None]
    for name in taken:
        if taken.count(name) > 1 or not name:
            raise ValueError(f"name={name!r}: expected a non-empty name for each ARM, none twice")
        if name in RESERVED:
            raise ValueError(f"name={name!r}: expected another one than {', '.join(RESERVED)}, which name drafters")
    names: list[str] = []
    for own, path in zip(given, paths):
        stem = (path and Path(path).name) or "arm"
        name, number = own or stem, 2
        while own is None and name in (*names, *taken, *RESERVED):
            name, number = f"{stem}{number}", number + 1
        names.append(name)
    return names
