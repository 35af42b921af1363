"""Try the regular expressions of an adapter's config in a process of their own first, since `re` can't be stopped.

A pattern such as `([a-z.]+)+!` takes longer than the age of the universe on the name of a layer. Nearly all patterns
are plain names; they are not tried.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

# Time limit for all patterns on all names, the start of the process included. Real patterns take milliseconds.
LIMIT_SECONDS = 5.0
REPEATS = re.compile(r"[*+{?]")
TRIAL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.match(pattern, name)
"""


def check_patterns(what: str, config: Any, names: Iterable[str]) -> None:
    """Raises ValueError for a pattern of a PEFT config that takes too long on the names of the base's modules.

    A pattern that is no regular expression passes; PEFT reports it.
    """
    given: list[tuple[str, str, str]] = []  # the field, its pattern, and the pattern in the form that PEFT matches
    for field, form in (("target_modules", "(?:{})\\Z"), ("exclude_modules", "(?:{})\\Z")):
        if isinstance(value := getattr(config, field, None), str):
            given.append((field, value, form.format(value)))
    layers = getattr(config, "layers_pattern", None) or ()
    listed = [layers] if isinstance(layers, str) else layers
    given += [("layers_pattern", str(value), rf".*\.{value}\.(\d+)\.") for value in listed]
    for field in ("rank_pattern", "alpha_pattern"):
        if isinstance(keys := getattr(config, field, None), Mapping):
            given += [(field, str(key), rf"(.*\.)?({key})\Z") for key in keys]
    given = [each for each in given if REPEATS.search(each[1])]
    if not given:
        return
    inputs = json.dumps([[tried for *_, tried in given], list(names)]).encode()
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", TRIAL],
            input=inputs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        said = ", ".join(f"{field}={pattern!r:.60}" for field, pattern, _ in given[:3])
        raise ValueError(
            f"{what}: {said}: expected a pattern that ends within {LIMIT_SECONDS:g} s over its base"
        ) from None
