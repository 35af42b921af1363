"""Loaded models that are kept between calls of `genarm_fast.generate` and `genarm_fast.stream`.

A model is found again by identity: the same model objects, or the same folders with the same files, with the same
options. Given models are held weakly: what is kept runs on a module tree of its own over their weights.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from genarm_fast.api import GenARM
from genarm_fast.engine.warm_up import EngineBusy
from genarm_fast.models.arm import ARM
from genarm_fast.models.files import weight_bytes
from genarm_fast.models.state import ModelState, folder_state, folders_of
from genarm_fast.models.weights import share_weights
from genarm_fast.utils.checks import check_flag, shown

LIMIT = "GENARM_FAST_KEEP_BYTES"
DEFAULT_LIMIT = 16 << 30  # a model of 7 B parameters in bfloat16, with its caches
OPTIONS = {  # of loading, with their defaults
    name: None if parameter.kind is parameter.VAR_KEYWORD else parameter.default
    for name, parameter in inspect.signature(GenARM.from_pretrained).parameters.items()
    if name not in ("base", "arms")
}
OF_A_CALL = ("speculation", "warm_up")  # options that can be had later, so that they need no model of their own
OF_AN_ARM = ("model", "base", "weight")  # fields that the key has otherwise, or not at all
VALUES = (str, bytes, int, float, type(None), torch.dtype, torch.device)  # options that are known by their value


class Slot:
    """A place for one model. Whoever holds the lock loads it, or looks whether it is still what was loaded."""

    def __init__(self, key: Any) -> None:
        self.key, self.lock = key, Lock()
        self.model: GenARM | None = None
        self.warm = False
        self.weights = 0  # bytes of weights that nobody else holds
        self.given: list[ModelState] = []
        self.folders: dict[str, Any] = {}
        self.roots: list[ReferenceType[nn.Module]] = []  # of given models; as one dies, the slot is dropped
        self.options: dict[str, Any] = {}  # what the key knows by its id lives as long as the key

    def changed(self) -> bool:
        given = any(state.changed() for state in self.given)
        return given or any(folder_state(folder) != seen for folder, seen in self.folders.items())

    @property
    def bytes(self) -> int:
        """What dropping it would free: weights, and the caches that calls have left."""
        return self.weights + (0 if self.model is None else self.model.workspace_bytes)


class KeptModels:
    """Slots by what was asked for, the least recently used one first."""

    def __init__(self) -> None:
        self._slots: dict[Any, Slot] = {}
        self._lock = Lock()

    def get(
        self, base: Any, specs: list[ARM], options: dict[str, Any], check: Callable[[], object] = lambda: None
    ) -> GenARM:
        """The one that is kept for these, or a new one. Threads that ask for the same one at a time load it once.

        check: called before one is loaded.

        Raises:
            TypeError, ValueError, FileNotFoundError: as `GenARM.from_pretrained`; and for a limit that is no number.
        """
        more = {} if options.get("model_kwargs") is None else options["model_kwargs"]
        if not isinstance(more, Mapping) or (twice := sorted(set(more) & set(OPTIONS))):
            expected = f"no {twice[0]!r} in it" if isinstance(more, Mapping) else "a mapping"
            raise TypeError(f"model_kwargs={shown(more)}: expected {expected}")
        warm = False if options.get("warm_up") is None else check_flag("warm_up", options["warm_up"])
        key = _key(base, specs, options)
        with self._lock:
            slot = self._slots.pop(key, None) or Slot(key)
            self._slots[key] = slot  # as the latest
        with slot.lock:
            model = None if slot.model is None or slot.changed() else slot.model
            if model is None:
                slot.model, slot.warm = None, False  # its memory is free for the new one
                try:
                    check()
                    model = self._load(slot, base, specs, options)
                except BaseException:
                    self._drop(slot)
                    raise
                slot.warm = warm
            elif warm and not slot.warm:
                with suppress(EngineBusy):  # it serves requests: a later call finds it idle
                    model.warm_up()
                    slot.warm = True
        return model

    def clear(self) -> None:
        """Forget all of them. Whoever still runs one holds it."""
        with self._lock:
            self._slots.clear()

    def forked(self) -> None:
        """In a forked process, which has one thread alone: what others were loading is forgotten."""
        self._lock = Lock()
        for slot in list(self._slots.values()):
            if slot.lock.locked():
                self._drop(slot)

    def _load(self, slot: Slot, base: Any, specs: list[ARM], options: dict[str, Any]) -> GenARM:
        draft_model = options.get("draft_model")
        sources = [base, *(spec.model for spec in specs), *(spec.base for spec in specs), draft_model]
        paths = [path for kind, path in map(_identity_of_source, sources) if kind == "folder"]
        inside = (options.get("model_kwargs") or {}).get("subfolder")
        folders = _with_parts([folder for path in _with_parts(paths, inside) for folder in folders_of(path)], inside)
        self._make_room(slot, sum(weight_bytes(Path(folder)) for folder in folders))
        given = {id(module): module for module in map(_inside, sources) if isinstance(module, nn.Module)}
        # What can change is looked at before it is read, so that a change meanwhile is noticed by the next call.
        slot.folders = {folder: folder_state(folder) for folder in folders}
        slot.given = [ModelState(module, versions=bool(folders)) for module in given.values()]
        slot.options = dict(options)
        trees = {key: share_weights(module) for key, module in given.items()}

        def own(source: Any) -> Any:
            return trees.get(id(_inside(source)), source)

        loading = {name: value for name, value in options.items() if name not in ("draft_model", "model_kwargs")}
        loading |= {} if draft_model is None else {"draft_model": own(draft_model)}
        loading |= options.get("model_kwargs") or {}  # none of which is an option by itself
        arms = [_over(spec, own(spec.model), own(spec.base)) for spec in specs]
        model = GenARM.from_pretrained(own(base), arms, **loading)
        for state in slot.given:
            state.moved_by_us()
        known = {tensor.data_ptr() for module in given.values() for tensor in module.parameters()}
        weights = {tensor.data_ptr(): tensor.nbytes for tree in _models(model) for tensor in tree.parameters()}
        slot.weights = sum(size for address, size in weights.items() if address not in known)
        slot.roots = [ref(module, self._dropping(slot)) for module in given.values()]
        slot.model = model
        with self._lock:  # `clear` may have come meanwhile
            self._slots.setdefault(slot.key, slot)
        self._make_room(slot, slot.weights)
        return model

    def _make_room(self, slot: Slot, needed: int) -> None:
        """Drop what was used least recently, other than this one, until all take no more than the limit."""
        limit = keep_limit()
        with self._lock:
            slots = list(self._slots.values())  # at once: the garbage collector may drop one meanwhile
        others = [each for each in slots if each is not slot and each.model is not None]
        total = needed + sum(other.bytes for other in others)
        for other in others:
            if total <= limit:
                break
            total -= other.bytes
            self._drop(other)

    def _dropping(self, slot: Slot) -> Any:
        """Called as a given model dies. It has no reference to the slot, whose memory is then freed at once."""
        weak = ref(slot)

        def drop(_: Any) -> None:
            if (dead := weak()) is not None:
                self._drop(dead)

        return drop

    def _drop(self, slot: Slot) -> None:
        """Without the lock: the garbage collector may call it in a thread that has it."""
        if self._slots.get(slot.key) is slot:
            self._slots.pop(slot.key, None)


def keep_limit() -> int:
    """Most bytes of the models that are kept together, from the environment."""
    text = os.environ.get(LIMIT) or str(DEFAULT_LIMIT)
    if not text.isdecimal():
        raise ValueError(f"{LIMIT}={text!r}: expected a number of bytes")
    return int(text)


def _models(model: GenARM) -> list[nn.Module]:
    return [member.model for member in (*model.members, model.draft_model) if member is not None]


def _key(base: Any, specs: list[ARM], options: dict[str, Any]) -> Any:
    """What a model is kept under. An ARM's weight is not in it: a call can have its own."""
    arms = [
        (
            _identity_of_source(spec.model),
            _identity_of_source(spec.base),
            _identity([getattr(spec, field.name) for field in fields(ARM) if field.name not in OF_AN_ARM]),
        )
        for spec in specs
    ]
    known = {name: options.get(name, default) for name, default in OPTIONS.items() if name not in OF_A_CALL}
    draft_model = _identity_of_source(known.pop("draft_model"))
    return _identity_of_source(base), tuple(arms), draft_model, _identity(known)


def _with_parts(folders: list[str], inside: Any) -> list[str]:
    """Folders, and this subfolder of those that have it."""
    within = [os.path.join(folder, inside) for folder in folders] if isinstance(inside, (str, os.PathLike)) else []
    return list(dict.fromkeys([*folders, *filter(os.path.isdir, within)]))


def _inside(source: Any) -> Any:
    """A compiled model's own modules."""
    return getattr(source, "_orig_mod", source)


def _identity_of_source(source: Any) -> tuple[str, Any]:
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        return ("folder", os.path.abspath(path)) if os.path.isdir(path) else ("hub", path)
    return "object", id(_inside(source))


def _identity(value: Any) -> Any:
    """Equal for options that load the same. Mutable objects are the same as long as they look the same."""
    if isinstance(value, VALUES):
        return type(value).__name__, value
    if isinstance(value, os.PathLike):
        return "path", os.fspath(value)
    if isinstance(value, dict):
        return tuple(sorted((repr(key), _identity(each)) for key, each in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_identity(each) for each in value)
    if isinstance(value, PreTrainedTokenizerBase):
        return id(value), len(value), repr(value.chat_template), value.eos_token
    return id(value), repr(value)


def _over(spec: ARM, model: Any, base: Any) -> ARM:
    """The same for other model objects; which adapter was active when it was made stays."""
    spec = copy.copy(spec)
    object.__setattr__(spec, "model", model)
    object.__setattr__(spec, "base", base)
    return spec
