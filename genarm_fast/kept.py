"""Loaded models that are kept between calls of `genarm_fast.generate` and `genarm_fast.stream`.

A call finds a kept model if it passes the same model objects, or the same folders with unchanged files, and the same
options. Model objects of the caller ("given models") are held by weak references alone: the kept model runs on module
trees of its own, which share their weights.
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
from genarm_fast.utils.checks import shown

LIMIT = "GENARM_FAST_KEEP_BYTES"
DEFAULT_LIMIT = 16 << 30  # a model of 7 B parameters in bfloat16, with its caches
OPTIONS = {  # options of `GenARM.from_pretrained`, each with its default
    name: None if parameter.kind is parameter.VAR_KEYWORD else parameter.default
    for name, parameter in inspect.signature(GenARM.from_pretrained).parameters.items()
    if name not in ("base", "arms")
}
OF_A_CALL = ("speculation", "warm_up")  # options that a later call can change, so they are not part of the key
OF_AN_ARM = ("model", "base", "weight")  # fields of `ARM` that `_key` treats apart or leaves out
VALUES = (str, bytes, int, float, type(None), torch.dtype, torch.device)  # types of options that compare by value


class Slot:
    """A place for one kept model. A thread holds `lock` while it loads the model, or checks it for changes."""

    def __init__(self, key: Any) -> None:
        self.key, self.lock = key, Lock()
        self.model: GenARM | None = None
        self.warm = False
        self.weights = 0  # bytes of the weights that this model loaded; weights of given models do not count
        self.given: list[ModelState] = []
        self.folders: dict[str, Any] = {}
        self.roots: list[ReferenceType[nn.Module]] = []  # given models; when one of them dies, the slot is dropped
        self.options: dict[str, Any] = {}  # kept, since the key has ids of these objects

    def changed(self) -> bool:
        """Whether a given model or a folder has changed since the model was loaded."""
        given = any(state.changed() for state in self.given)
        return given or any(folder_state(folder) != seen for folder, seen in self.folders.items())

    @property
    def bytes(self) -> int:
        """Bytes that dropping the slot would free: weights, and the caches that calls have left."""
        return self.weights + (0 if self.model is None else self.model.workspace_bytes)


class KeptModels:
    """Slots of kept models by their key, the least recently used one first."""

    def __init__(self) -> None:
        self._slots: dict[Any, Slot] = {}
        self._lock = Lock()

    def get(
        self, base: Any, specs: list[ARM], options: dict[str, Any], check: Callable[[], object] = lambda: None
    ) -> GenARM:
        """Return the model that is kept for these arguments, or load it. Threads that ask together load it once.

        check: called before a model is loaded.

        Raises:
            TypeError, ValueError, FileNotFoundError: as from `GenARM.from_pretrained`; ValueError also for a limit in
                the environment that is not a number of bytes.
        """
        more = {} if options.get("model_kwargs") is None else options["model_kwargs"]
        if not isinstance(more, Mapping) or (twice := sorted(set(more) & set(OPTIONS))):
            expected = f"no {twice[0]!r} in it" if isinstance(more, Mapping) else "a mapping"
            raise TypeError(f"model_kwargs={more!r}: expected {expected}")
        warm = False if options.get("warm_up") is None else options["warm_up"]
        if not isinstance(warm, bool):
            raise TypeError(f"warm_up={shown(warm)}: expected True or False")
        key = _key(base, specs, options)
        with self._lock:
            slot = self._slots.pop(key, None) or Slot(key)
            self._slots[key] = slot  # last in the order: used most recently
        with slot.lock:
            model = None if slot.model is None or slot.changed() else slot.model
            if model is None:
                slot.model, slot.warm = None, False  # frees the old model's memory before the new one is loaded
                try:
                    check()
                    model = self._load(slot, base, specs, options)
                except BaseException:
                    self._drop(slot)
                    raise
                slot.warm = warm
            elif warm and not slot.warm:
                with suppress(EngineBusy):  # the model is serving requests now; a later call will warm it up
                    model.warm_up()
                    slot.warm = True
        return model

    def clear(self) -> None:
        """Forget all models. A call that still runs one keeps it alive until the call ends."""
        with self._lock:
            self._slots.clear()

    def forked(self) -> None:
        """Forget, in a forked process, what other threads of the parent were loading: they are not in the child."""
        self._lock = Lock()
        for slot in list(self._slots.values()):
            if slot.lock.locked():
                self._drop(slot)

    def _load(self, slot: Slot, base: Any, specs: list[ARM], options: dict[str, Any]) -> GenARM:
        """Load a model into a slot, after other models were dropped where it needs their memory."""
        draft_model = options.get("draft_model")
        sources = [base, *(spec.model for spec in specs), *(spec.base for spec in specs), draft_model]
        paths = [path for kind, path in map(_identity_of_source, sources) if kind == "folder"]
        inside = (options.get("model_kwargs") or {}).get("subfolder")
        folders = _with_parts([folder for path in _with_parts(paths, inside) for folder in folders_of(path)], inside)
        self._make_room(slot, sum(weight_bytes(Path(folder)) for folder in folders))
        given = {id(module): module for module in map(_inside, sources) if isinstance(module, nn.Module)}
        # The state of files and models is recorded before they are read. So the next call notices a change meanwhile.
        slot.folders = {folder: folder_state(folder) for folder in folders}
        slot.given = [ModelState(module, versions=bool(folders)) for module in given.values()]
        slot.options = dict(options)
        trees = {key: share_weights(module) for key, module in given.items()}

        def own(source: Any) -> Any:
            return trees.get(id(_inside(source)), source)

        loading = {name: value for name, value in options.items() if name not in ("draft_model", "model_kwargs")}
        loading |= {} if draft_model is None else {"draft_model": own(draft_model)}
        loading |= options.get("model_kwargs") or {}  # `get` has refused names in it that are options
        arms = [_over(spec, own(spec.model), own(spec.base)) for spec in specs]
        model = GenARM.from_pretrained(own(base), arms, **loading)
        for state in slot.given:
            state.moved_by_us()
        known = {tensor.data_ptr() for module in given.values() for tensor in module.parameters()}
        weights = {tensor.data_ptr(): tensor.nbytes for tree in _models(model) for tensor in tree.parameters()}
        slot.weights = sum(size for address, size in weights.items() if address not in known)
        slot.roots = [ref(module, self._dropping(slot)) for module in given.values()]
        slot.model = model
        with self._lock:  # `clear` may have removed the slot meanwhile
            self._slots.setdefault(slot.key, slot)
        self._make_room(slot, slot.weights)
        return model

    def _make_room(self, slot: Slot, needed: int) -> None:
        """Drop other models, least recently used first, until all take no more bytes than the limit.

        needed: bytes of this slot's own model.
        """
        limit = keep_limit()
        with self._lock:
            slots = list(self._slots.values())  # a copy, since the garbage collector may drop a slot meanwhile
        others = [each for each in slots if each is not slot and each.model is not None]
        total = needed + sum(other.bytes for other in others)
        for other in others:
            if total <= limit:
                break
            total -= other.bytes
            self._drop(other)

    def _dropping(self, slot: Slot) -> Any:
        """Return a callback that drops the slot when a given model dies.

        The callback holds a weak reference alone, so that a dropped slot's memory is freed at once.
        """
        weak = ref(slot)

        def drop(_: Any) -> None:
            if (dead := weak()) is not None:
                self._drop(dead)

        return drop

    def _drop(self, slot: Slot) -> None:
        """Remove a slot, without the lock: the garbage collector may call this in a thread that holds it."""
        if self._slots.get(slot.key) is slot:
            self._slots.pop(slot.key, None)


def keep_limit() -> int:
    """Return the most bytes that all kept models may take together, from the environment.

    Raises:
        ValueError: the variable is not a number of bytes.
    """
    text = os.environ.get(LIMIT) or str(DEFAULT_LIMIT)
    if not text.isdecimal():
        raise ValueError(f"{LIMIT}={text!r}: expected a number of bytes")
    return int(text)


def _models(model: GenARM) -> list[nn.Module]:
    return [member.model for member in (*model.members, model.draft_model) if member is not None]


def _key(base: Any, specs: list[ARM], options: dict[str, Any]) -> Any:
    """Return the key under which a model is kept. ARMs' weights are not part of it, since each call can set them."""
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
    """Return the folders, and the subfolder `inside` of each folder that has it, without repetitions."""
    within = [os.path.join(folder, inside) for folder in folders] if isinstance(inside, (str, os.PathLike)) else []
    return list(dict.fromkeys([*folders, *filter(os.path.isdir, within)]))


def _inside(source: Any) -> Any:
    """Return the module that `torch.compile` wrapped; any other source as it is."""
    return getattr(source, "_orig_mod", source)


def _identity_of_source(source: Any) -> tuple[str, Any]:
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        return ("folder", os.path.abspath(path)) if os.path.isdir(path) else ("hub", path)
    return "object", id(_inside(source))


def _identity(value: Any) -> Any:
    """Return a value that is equal for options that load the same model.

    An object is known by its id and its `repr`, so a change of a mutable one counts if `repr` shows it.
    """
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
    """Return a copy of an ARM over other model objects. The adapter that was active at its creation stays recorded."""
    spec = copy.copy(spec)
    object.__setattr__(spec, "model", model)
    object.__setattr__(spec, "base", base)
    return spec
