"""Check of a decoder's source: whether it treats all layers alike, so that a test of some layers is valid for all.

The plain loop of transformers' decoders passes, over layers that write their own part of the cache. Code that knows
which layer it is in does not pass. Nor does a loop that gives a layer anything but the hidden states of the previous
one, nor code that is not from transformers or PEFT.
"""

from __future__ import annotations

import ast
import contextlib
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genarm_fast.engine.verdict_key import codes_of, known_by_version

READ_PACKAGES = ("transformers",)  # packages whose layers may pass, after their source was read
TRUSTED_PACKAGES = ("peft", "genarm_fast", "torch", "huggingface_hub")  # their modules do not depend on the layer
# Attention functions of transformers.
KNOWN_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
CACHE = r"(?:past_key_values?|layer_past)"
# Arguments that have the same value for all layers.
SHARED_ARGUMENTS = rf"attention_mask|position_embeddings|position_ids|use_cache|cache_position|{CACHE}"
# A write to the layer's own cache.
OWN_CACHE_UPDATE = re.compile(rf"{CACHE}\.update\(\w+, \w+, self\.layer_idx(?:, \w+)?\)")
OTHER_CACHE_USE = rf"{CACHE}(?:\.|\[)|= {CACHE}$|['\"]{CACHE}['\"]"  # other uses of the cache
LASTING_STATE = r"^ *\w+\.[\w.]+(?:\[.*\])? [-+*/|]?= |\b(?:global|nonlocal)\b"  # state that outlives a forward
# Signs that layers may compute differently.
LAYER_DEPENDENT_CODE = re.compile(rf"layer_idx|{OTHER_CACHE_USE}|{LASTING_STATE}", re.MULTILINE)


def lists_indexed_by_layer(decoder: Any, layers: str) -> frozenset[str] | None:
    """Return the names of the config's lists of which the decoder's loop gives each layer its own entry.

    layers: name of the decoder's list of layers.

    Returns None if the loop, or the code of a layer, does not pass.
    """
    if (attention := decoder.config._attn_implementation) not in KNOWN_ATTENTION:
        return None
    kinds = {type(module) for layer in getattr(decoder, layers) for module in layer.modules()}
    bases = {base for kind in kinds for base in kind.__mro__ if not known_by_version(base)}
    forwards = [
        type(decoder).forward,
        ALL_ATTENTION_FUNCTIONS.get(attention, None),
        *(value for base in bases for value in vars(base).values()),
    ]
    if not all(map(_package, {type(decoder), *bases})) or not _from_known_files(forwards):
        return None
    own = [base for base in bases if _package(base) in READ_PACKAGES and base is not GradientCheckpointingLayer]
    if any(LAYER_DEPENDENT_CODE.search(OWN_CACHE_UPDATE.sub("", text)) for base in own for text in _sources(base)):
        return None
    return _lists_of_loop(type(decoder), layers)


def _lists_of_loop(kind: type, layers: str) -> frozenset[str] | None:
    """Return the names X of `self.config.X[i]` in the loop over the layers, or None.

    None means that the loop is not a plain one, or that the class uses its layers elsewhere too.
    """
    text = _source_of(_file(kind), kind.__name__)
    loop = re.search(
        rf"\n        for (?:(?P<i>\w+), )?(?P<layer>\w+) in (?:enumerate\()?self\.{layers}"
        r"(?:\[:self\.config\.num_hidden_layers\])?\)?:"
        r"\n            hidden_states = (?P=layer)\(hidden_states(?P<given>.*)\)\n        \S",
        text,
    )
    if loop is None or len(re.findall(rf"\bself\.{layers}\b", text)) != 1 or loop["layer"] in loop["given"]:
        return None
    lists = set()
    given = loop["given"].removesuffix(", **kwargs")
    if given != loop["given"] and re.search(r"\bkwargs(?:\[|\.| = )", text):
        return None  # the loop may put a layer's own values into its keyword arguments
    for each in filter(None, given.split(", ")):
        entry = rf"self\.config\.(?P<list>\w+)\[{loop['i']}\]"
        found = re.fullmatch(rf"(?:{SHARED_ARGUMENTS})=(?P<value>\w+)(?:\[{entry}\])?", each)
        if found is None or found["value"] == loop["i"]:
            return None
        lists |= {found["list"]} - {None}
    return frozenset(lists)


def _package(kind: type) -> str | None:
    """Return the package of a class if it is one of READ_PACKAGES and TRUSTED_PACKAGES, else None."""
    name = kind.__module__.split(".")[0]
    return name if name in (*READ_PACKAGES, *TRUSTED_PACKAGES) else None


def _from_known_files(functions: Iterable[Any]) -> bool:
    """Whether functions, and those that they call by name, come from files of the known packages and not from patches.

    The known packages are READ_PACKAGES and TRUSTED_PACKAGES.
    """
    return all(code.co_filename.startswith(_folders()) for each in functions for code in codes_of(each))


def _folders() -> tuple[str, ...]:
    files = (sys.modules[name].__file__ for name in (*READ_PACKAGES, *TRUSTED_PACKAGES) if name in sys.modules)
    # The packages' functions have wrappers of contextlib.
    return (contextlib.__file__, *(f"{Path(file).parent}/" for file in files if file))


def _sources(kind: type) -> Iterator[str]:
    """Iterate over the sources of a class without its `__init__`, and of the functions in its file that it names."""
    file = _file(kind)
    yield (text := _source_of(file, kind.__name__))
    for name in _names_of_functions(file):
        if re.search(rf"\b{name}\b", text):
            yield _source_of(file, name)


def _file(kind: type) -> str:
    return str(sys.modules[kind.__module__].__file__)


@cache
def _parsed(file: str) -> dict[str, ast.stmt]:
    """Return the syntax trees of a file's classes and functions by name."""
    parts = ast.parse(Path(file).read_text(encoding="utf-8")).body
    return {part.name: part for part in parts if isinstance(part, (ast.ClassDef, ast.FunctionDef))}


def _names_of_functions(file: str) -> list[str]:
    return [name for name, part in _parsed(file).items() if isinstance(part, ast.FunctionDef)]


@cache
def _source_of(file: str, name: str) -> str:
    """Return the source of a class without its `__init__`, or of a function, without comments and in one layout."""
    part = _parsed(file).get(name)
    if part is None:
        return "layer_idx"  # unknown code does not pass: `LAYER_DEPENDENT_CODE` matches this
    if isinstance(part, ast.ClassDef):
        part.body = [each for each in part.body if getattr(each, "name", "") != "__init__"]
    return ast.unparse(part)
