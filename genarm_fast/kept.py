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
from genarm_fast.utils.checks import check_flag, shown

LIMIT = "GENARM_FAST_KEEP_BYTES"
DEFAULT_LIMIT = 16 << 30  # a model of 7 B parameters in bfloat16, with its caches
OPTIONS = {  # options of `GenARM.from_pretrained`, each with its default
    name: None if parameter.kind is parameter.VAR_KEYWORD else parameter.default
    for name, parameter in inspect.signature(GenARM.from_pretrained).parameters.items()
    if name not in ("base", "arms")
}
CALL_OPTIONS = ("speculation", "warm_up")  # options that a later call can change, so they are not part of the key
ARM_FIELDS_NOT_IN_KEY = ("model", "base", "weight")  # fields of `ARM` that `_key` treats apart or leaves out
VALUE_TYPES = (str, bytes, int, float, type(None), torch.dtype, torch.device)  # types of options that compare by value


class KeptModel:
    """One kept model, and what it was loaded from. A thread holds `lock` while it loads or checks the model."""

    def __init__(self, key: Any) -> None:
        self.key, self.lock = key, Lock()
        self.model: GenARM | None = None
        self.warm = False
        self.weights = 0  # bytes of the weights that this model loaded; weights of given models do not count
        self.given_states: list[ModelState] = []
        self.folders: dict[str, Any] = {}
        self.given_refs: list[ReferenceType[nn.Module]] = []  # given models; when one dies, the entry is dropped
        self.options: dict[str, Any] = {}  # kept, since the key has ids of these objects

    def changed(self) -> bool:
        """Whether a given model or a folder has changed since the model was loaded."""
        given = any(state.changed() for state in self.given_states)
        return given or any(folder_state(folder) != seen for folder, seen in self.folders.items())

    @property
    def bytes(self) -> int:
        """Bytes that dropping this model would free: weights, and the caches that calls have left."""
        return self.weights + (0 if self.model is None else self.model.workspace_bytes)


class KeptModels:
    """Kept models by their key, the least recently used one first."""

    def __init__(self) -> None:
        self._entries: dict[Any, KeptModel] = {}
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
        model_kwargs = {} if options.get("model_kwargs") is None else options["model_kwargs"]
        if not isinstance(model_kwargs, Mapping) or (twice := sorted(set(model_kwargs) & set(OPTIONS))):
            expected = f"no {twice[0]!r} in it" if isinstance(model_kwargs, Mapping) else "a mapping"
            raise TypeError(f"model_kwargs={shown(model_kwargs)}: expected {expected}")
        warm = False if options.get("warm_up") is None else check_flag("warm_up", options["warm_up"])
        key = _key(base, specs, options)
        with self._lock:
            entry = self._entries.pop(key, None) or KeptModel(key)
            self._entries[key] = entry  # last in the order: used most recently
        with entry.lock:
            model = None if entry.model is None or entry.changed() else entry.model
            if model is None:
                entry.model, entry.warm = None, False  # frees the old model's memory before the new one is loaded
                try:
                    check()
                    model = self._load(entry, base, specs, options)
                except BaseException:
                    self._drop(entry)
                    raise
                entry.warm = warm
            elif warm and not entry.warm:
                with suppress(EngineBusy):  # the model is serving requests now; a later call will warm it up
                    model.warm_up()
                    entry.warm = True
        return model

    def clear(self) -> None:
        """Forget all models. A call that still runs one keeps it alive until the call ends."""
        with self._lock:
            self._entries.clear()

    def forked(self) -> None:
        """Forget, in a forked process, what other threads of the parent were loading: they are not in the child."""
        self._lock = Lock()
        for entry in list(self._entries.values()):
            if entry.lock.locked():
                self._drop(entry)

    def _load(self, entry: KeptModel, base: Any, specs: list[ARM], options: dict[str, Any]) -> GenARM:
        """Load a model into an entry, after other models were dropped where it needs their memory."""
        draft_model = options.get("draft_model")
        sources = [base, *(spec.model for spec in specs), *(spec.base for spec in specs), draft_model]
        paths = [path for kind, path in map(_identity_of_source, sources) if kind == "folder"]
        subfolder = (options.get("model_kwargs") or {}).get("subfolder")
        paths = _with_subfolders(paths, subfolder)
        folders = _with_subfolders([folder for path in paths for folder in folders_of(path)], subfolder)
        self._make_room(entry, sum(weight_bytes(Path(folder)) for folder in folders))
        given = {id(module): module for module in map(_uncompiled, sources) if isinstance(module, nn.Module)}
        # The state of files and models is recorded before they are read. So the next call notices a change meanwhile.
        entry.folders = {folder: folder_state(folder) for folder in folders}
        entry.given_states = [ModelState(module, versions=bool(folders)) for module in given.values()]
        entry.options = dict(options)
        trees = {key: share_weights(module) for key, module in given.items()}

        def own(source: Any) -> Any:
            return trees.get(id(_uncompiled(source)), source)

        loading = {name: value for name, value in options.items() if name not in ("draft_model", "model_kwargs")}
        loading |= {} if draft_model is None else {"draft_model": own(draft_model)}
        loading |= options.get("model_kwargs") or {}  # `get` has refused names in it that are options
        arms = [_with_models(spec, own(spec.model), own(spec.base)) for spec in specs]
        model = GenARM.from_pretrained(own(base), arms, **loading)
        for state in entry.given_states:
            state.moved_by_us()
        known = {tensor.data_ptr() for module in given.values() for tensor in module.parameters()}
        weights = {tensor.data_ptr(): tensor.nbytes for tree in _models(model) for tensor in tree.parameters()}
        entry.weights = sum(size for address, size in weights.items() if address not in known)
        entry.given_refs = [ref(module, self._dropping(entry)) for module in given.values()]
        entry.model = model
        with self._lock:  # `clear` may have removed the entry meanwhile
            self._entries.setdefault(entry.key, entry)
        self._make_room(entry, entry.weights)
        return model

    def _make_room(self, entry: KeptModel, needed: int) -> None:
        """Drop other models, least recently used first, until all take no more bytes than the limit.

        needed: bytes of this entry's own model.
        """
        limit = keep_limit()
        with self._lock:
            entries = list(self._entries.values())  # a copy, since the garbage collector may drop an entry meanwhile
        others = [each for each in entries if each is not entry and each.model is not None]
        total = needed + sum(other.bytes for other in others)
        for other in others:
            if total <= limit:
                break
            total -= other.bytes
            self._drop(other)

    def _dropping(self, entry: KeptModel) -> Any:
        """Return a callback that drops the entry when a given model dies.

        The callback holds a weak reference alone, so that a dropped entry's memory is freed at once.
        """
        weak = ref(entry)

        def drop(_: Any) -> None:
            if (dead := weak()) is not None:
                self._drop(dead)

        return drop

    def _drop(self, entry: KeptModel) -> None:
        """Remove an entry, without the lock: the garbage collector may call this in a thread that holds it."""
        if self._entries.get(entry.key) is entry:
            self._entries.pop(entry.key, None)


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
            _identity([getattr(spec, field.name) for field in fields(ARM) if field.name not in ARM_FIELDS_NOT_IN_KEY]),
        )
        for spec in specs
    ]
    known = {name: options.get(name, default) for name, default in OPTIONS.items() if name not in CALL_OPTIONS}
    draft_model = _identity_of_source(known.pop("draft_model"))
    return _identity_of_source(base), tuple(arms), draft_model, _identity(known)


def _with_subfolders(folders: list[str], subfolder: Any) -> list[str]:
    """Return the folders, and this subfolder of each folder that has it, without repetitions."""
    if not isinstance(subfolder, (str, os.PathLike)):
        return list(dict.fromkeys(folders))
    subfolders = [os.path.join(folder, subfolder) for folder in folders]
    return list(dict.fromkeys([*folders, *filter(os.path.isdir, subfolders)]))


def _uncompiled(source: Any) -> Any:
    """Return the module that `torch.compile` wrapped; any other source as it is."""
    return getattr(source, "_orig_mod", source)


def _identity_of_source(source: Any) -> tuple[str, Any]:
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        return ("folder", os.path.abspath(path)) if os.path.isdir(path) else ("hub", path)
    return "object", id(_uncompiled(source))


def _identity(value: Any) -> Any:
    """Return a value that is equal for options that load the same model.

    An object is known by its id and its `repr`, so a change of a mutable one counts if `repr` shows it.
    """
    if isinstance(value, VALUE_TYPES):
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


def _with_models(spec: ARM, model: Any, base: Any) -> ARM:
    """Return a copy of an ARM over other model objects. The adapter that was active at its creation stays recorded."""
    spec = copy.copy(spec)
    object.__setattr__(spec, "model", model)
    object.__setattr__(spec, "base", base)
    return spec
