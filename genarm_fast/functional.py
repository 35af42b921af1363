"""Module-level `generate`, `stream`, `agenerate` and `astream`: they load a model once and keep it for later calls."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import fields
from typing import Any

from torch import nn

from genarm_fast.api import GenARM
from genarm_fast.engine.async_stream import AsyncStream, Parts
from genarm_fast.engine.stream import Stream
from genarm_fast.kept import OPTIONS, KeptModels
from genarm_fast.models.arm import ARM, as_arms
from genarm_fast.models.hub import Source
from genarm_fast.outputs import GenerationOutput
from genarm_fast.params import SamplingParams, weights_per_arm
from genarm_fast.speculation.config import as_speculation
from genarm_fast.text.given import as_prompts
from genarm_fast.utils.checks import check_integer

_SAMPLING = {field.name: field.default for field in fields(SamplingParams)}
_SAMPLING |= {"tools": None, "chat_template_kwargs": None}  # keywords for prompts that are chats
_kept = KeptModels()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_kept.forked)


def generate(
    base: Source | nn.Module,
    arms: Source | nn.Module | ARM | Sequence[Source | nn.Module | ARM],
    prompts: Any,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    progress: bool = False,
    **keywords: Any,
) -> list[GenerationOutput]:
    """Return guided completions, one output per prompt in order. The first call loads the model; later calls reuse it.

    A model object that is passed as `base` or `arms` may be changed between calls. Weights changed in place count from
    the next call on. If its modules, adapters or the memory of its weights changed, the next call prepares it again.
    If a folder's files changed, the next call loads them again. A hub id is looked up once.

    Args:
        base, arms: as in `GenARM.from_pretrained`. Model objects are not kept alive.
        prompts, sampling_params, progress: as in `GenARM.generate`. Without `weights`, each ARM's own weight counts.
        keywords: options of `GenARM.from_pretrained`, with its `model_kwargs` as a mapping, and fields of
            `SamplingParams` to replace. Options that differ from those of earlier calls load another model;
            `speculation` and `warm_up` do not.

    Raises:
        TypeError: a keyword that is neither an option nor a field, before any work.
        TypeError, ValueError, FileNotFoundError, GenerationError: as from `GenARM.from_pretrained` and
            `GenARM.generate`.
    """
    model, params, overrides = _prepare(base, arms, prompts, sampling_params, keywords)
    return model.generate(prompts, params, progress=progress, **overrides)


def stream(
    base: Source | nn.Module,
    arms: Source | nn.Module | ARM | Sequence[Source | nn.Module | ARM],
    prompts: Any,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    **keywords: Any,
) -> Stream:
    """Stream the tokens of one or several prompts: see `GenARM.stream`. Arguments and errors as in `generate`."""
    model, params, overrides = _prepare(base, arms, prompts, sampling_params, keywords)
    return model.stream(prompts, params, **overrides)


async def agenerate(
    base: Source | nn.Module,
    arms: Source | nn.Module | ARM | Sequence[Source | nn.Module | ARM],
    prompts: Any,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    progress: bool = False,
    **keywords: Any,
) -> list[GenerationOutput]:
    """Do as `generate` without blocking the event loop while a model loads or decodes: see `GenARM.agenerate`."""
    model, params, overrides = await _prepare_apart(base, arms, prompts, sampling_params, keywords)
    return await model.agenerate(prompts, params, progress=progress, **overrides)


def astream(
    base: Source | nn.Module,
    arms: Source | nn.Module | ARM | Sequence[Source | nn.Module | ARM],
    prompts: Any,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    ahead: int = 0,
    **keywords: Any,
) -> AsyncStream:
    """Do as `stream` in an event loop: see `GenARM.astream`. Errors in arguments are raised when the stream begins."""

    async def prepare() -> Parts:
        model, params, overrides = await _prepare_apart(base, arms, prompts, sampling_params, keywords)
        return await model.parts_of_stream(prompts, params, overrides.pop("speculation"), overrides)

    return AsyncStream(prepare, check_integer("ahead", ahead, "an integer >= 0", 0))


def release() -> None:
    """Forget every model that these functions keep. A model that is still running is freed when its calls end."""
    _kept.clear()


async def _prepare_apart(*given: Any) -> tuple[GenARM, Any, dict[str, Any]]:
    """Run `_prepare` in a thread of its own.

    The event loop's executor has few threads: many calls that wait for one load would occupy all of them.
    """
    with_context = copy_context().run
    executor = ThreadPoolExecutor(1, "genarm_fast load")
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, with_context, _prepare, *given)
    finally:
        executor.shutdown(wait=False)


def _prepare(
    base: Any, arms: Any, prompts: Any, params: Any, keywords: dict[str, Any]
) -> tuple[GenARM, Any, dict[str, Any]]:
    """Return the model, and the sampling parameters and keywords to call its methods with."""
    unknown = sorted(set(keywords) - set(OPTIONS) - set(_SAMPLING))
    if unknown:
        raise TypeError(
            f"unknown argument {unknown[0]!r}: expected an option of loading ({', '.join(OPTIONS)}) or a sampling"
            f" parameter ({', '.join(_SAMPLING)})"
        )
    options = {name: value for name, value in keywords.items() if name in OPTIONS}
    overrides = {name: value for name, value in keywords.items() if name in _SAMPLING}
    overrides["speculation"] = options.pop("speculation", None)
    specs = as_arms(arms)
    model = kept_model(base, specs, options, lambda: _check(prompts, params, overrides))
    own = tuple(float(spec.weight) for spec in specs)
    if overrides.get("weights") is None:
        overrides.pop("weights", None)
        if own != tuple(arm.weight for arm in model.arms):  # the kept model was loaded with other default weights
            params = _with_own_weights(params, model.arm_names, own)
    else:
        overrides["weights"] = weights_or_own(overrides["weights"], model.arm_names, own)
    return model, params, overrides


def _check(prompts: Any, params: Any, overrides: Mapping[str, Any]) -> None:
    """Raise for arguments that are wrong with any model, before one is loaded, which can take minutes."""
    sampling = {name: value for name, value in overrides.items() if name in SamplingParams.__slots__}
    chat = {name: overrides.get(name) for name in ("tools", "chat_template_kwargs")}
    as_prompts(prompts, **chat)
    if overrides["speculation"] is not None:
        as_speculation(overrides["speculation"])
    for given in params if isinstance(params, Sequence) else [SamplingParams() if params is None else params]:
        if isinstance(given, SamplingParams):  # other types are refused later, in an error with the number of prompts
            given.override(**sampling)


def kept_model(
    base: Any, specs: list[ARM], options: dict[str, Any], check: Callable[[], object] = lambda: None
) -> GenARM:
    """Return the model that the next call of `generate` with these options would use, loaded if it is not kept yet.

    Default weights of its ARMs may differ from those in `specs`: see `weights_or_own`.

    check: called before a model is loaded; its errors pass through.
    """
    return _kept.get(base, specs, options, check)


def weights_or_own(weights: Any, names: Sequence[str], own: tuple[float, ...]) -> Any:
    """Return the weights of a call for the ARMs in `names`. ARMs that the call leaves out get theirs from `own`."""
    if weights is None:
        return own
    return weights_per_arm(weights, names, own) if isinstance(weights, Mapping) else weights


def _with_own_weights(params: Any, names: Sequence[str], own: tuple[float, ...]) -> Any:
    """Return sampling parameters that have the ARMs' own weights where they had none. Wrong types are refused later."""
    if params is None:
        return SamplingParams(weights=own)
    if isinstance(params, SamplingParams):
        return params.override(weights=weights_or_own(params.weights, names, own))
    if isinstance(params, Sequence):
        return [each if each is None else _with_own_weights(each, names, own) for each in params]
    return params


def _full_signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the function's signature with every keyword by its name, for `help` and editors."""
    own = list(inspect.signature(function).parameters.values())[:-1]
    names = OPTIONS | _SAMPLING
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in names.items()]
    return inspect.Signature([*own, *more], return_annotation=inspect.signature(function).return_annotation)


for _function in (generate, stream, agenerate, astream):
    vars(_function)["__signature__"] = _full_signature(_function)
