"""The key of a self-check's verdict: a hash of code, shapes and settings, but not of the values of weights.

Two influences are not part of it, since no model of transformers has them: attention that computes otherwise because
of the values of its weights, or because of an environment variable that its own code reads.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import genarm_fast.kernels as kernels
from genarm_fast.models.member import Member

PACKAGE = Path(__file__).parents[1]
SOURCES = (
    *("__init__.py", "models/*.py", "device/*.py"),
    *("engine/model_runner.py", "engine/selfcheck.py", "engine/layer_code.py", "engine/layer_kinds.py"),
)
SIMPLE = (bool, int, float, str, type(None))  # types of a module's attributes that may decide how it computes
PACKAGES = ("transformers", "peft", "flash-attn", "bitsandbytes")


def verdict_key(members: Sequence[Member]) -> str | None:
    """Return the key of members of one forward. It takes 50 ms of CPU time for SmolLM2-135M, the check itself 3 s.

    Returns:
        64 hex digits, or None if it is not known what code runs: there are hooks, a module has its own forward, a class
        has no file, weights are on several devices, or an object can't be described. Such a model is checked each time.
    """
    parts: list[Any] = [_library(), _machine(members[0].device), [member.lane for member in members]]
    try:
        described = [_described(member.model) for member in members]
    except (AttributeError, OSError, TypeError, ValueError):  # a user's own modules or configuration
        return None
    if None in described:
        return None
    return hashlib.sha256(json.dumps([parts, described], sort_keys=True, default=repr).encode()).hexdigest()


def _described(model: Any) -> list[Any] | None:
    """Return a description of a model's code, shapes and settings; None if it is not known what code runs."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    if len({tensor.device for tensor in tensors.values()}) != 1:
        return None
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()]
    modules: list[Any] = []
    kinds: dict[type, None] = {}
    for name, module in model.named_modules():
        own = vars(module)
        if "forward" in own or module._forward_hooks or module._forward_pre_hooks:
            return None
        kinds[type(module)] = None
        simple = {key: value for key, value in own.items() if isinstance(value, SIMPLE) and key != "training"}
        adapter = [repr(own.get(key)) for key in ("scaling", "merged_adapters", "_active_adapter")]
        modules.append((name, type(module).__qualname__, simple, adapter))
    classes = dict.fromkeys(base for kind in kinds for base in kind.__mro__ if not known_by_version(base))
    files = {_file(each.__module__) for each in classes}
    if None in files:
        return None
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    attention = model.config._attn_implementation
    codes = [(each.__module__, each.__qualname__, *_codes(vars(each).values())) for each in classes]
    return [
        *(repr(config), attention, _codes([ALL_ATTENTION_FUNCTIONS.get(attention, None)])),
        *(shapes, modules, codes, sorted(_digest(file) for file in files if file)),
    ]


def known_by_version(kind: type) -> bool:
    return kind.__module__.split(".")[0] in ("torch", "builtins", "typing", "abc")


def _file(module: str) -> str | None:
    file = getattr(sys.modules.get(module), "__file__", None)
    return file if file and Path(file).is_file() else None


def _codes(values: Iterable[Any]) -> list[str]:
    """Return the hashes of all code objects that `codes_of` gives for these values."""
    return [_code(code) for value in values for code in codes_of(value)]


def codes_of(value: Any) -> Iterator[CodeType]:
    """Iterate over the code of a function and of functions that it calls by a global name.

    Such a function may be replaced at run time, while its file stays the same.
    """
    for function in _functions(value):
        names = function.__code__.co_names
        called = [function.__globals__[name] for name in names if name in function.__globals__]
        for each in (function, *(helper for other in called for helper in _functions(other))):
            yield each.__code__


def _functions(value: Any) -> Iterator[FunctionType]:
    """Iterate over a function and the functions that it wraps. Other objects give nothing."""
    value = getattr(value, "__func__", getattr(value, "fget", value))
    while isinstance(value, FunctionType):
        yield value
        value = vars(value).get("__wrapped__")


@cache
def _code(code: CodeType) -> str:
    constants = [_code(each) if isinstance(each, CodeType) else _constant(each) for each in code.co_consts]
    parts = (code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, constants)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _constant(value: Any) -> str:
    """Return a constant's `repr`, with sets sorted, since their order differs between processes."""
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


@cache
def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@cache
def _library() -> list[Any]:
    """Return digests of genarm_fast's own code, and the versions of Python, torch and other packages."""
    files = [path for pattern in SOURCES for path in PACKAGE.glob(pattern)]
    files += [path for pattern in ("**/*.py", "*.so") for path in Path(inspect.getfile(kernels)).parent.glob(pattern)]
    return [
        [_digest(str(path)) for path in sorted(files)],
        *(sys.version, torch.__version__, torch.version.cuda),
        *(_version(name) for name in PACKAGES),
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine(device: torch.device) -> list[Any]:
    """Return the device's type and model, whether C++ kernels are there, and the precision of matrix products."""
    kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else None
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    core = kernels._native.core
    return [device.type, kind, core is not None, torch.get_float32_matmul_precision()]
