"""The arguments with which vLLM runs a base and its ARMs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from genarm_fast.integrations.vllm.adapters import adapted_model, check_lane, same_weights
from genarm_fast.integrations.vllm.prompts import trained_arguments
from genarm_fast.integrations.vllm.served import ARCHITECTURE, Served, ServedARM
from genarm_fast.models.adapter import check_alone
from genarm_fast.models.arm import ARM, arm_names, as_arms
from genarm_fast.models.hub import Source, locate

ARGUMENTS_FROM_BASE = ("model", "task", "runner")  # vLLM's arguments that follow from the base
OVERRIDE_FIELDS = ("architectures", "genarm_arms", "genarm_weight_range", "genarm_vocab_size")


def engine_args(
    base: Source,
    arms: Source | ARM | Sequence[Source | ARM],
    *,
    weight_range: tuple[float, float] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return arguments of `vllm.LLM(**...)`, `EngineArgs` and `AsyncEngineArgs` for guided decoding.

        llm = vllm.LLM(**engine_args("meta-llama/...-70B", [ARM("...-7B-ARM", name="kind", weight=0.5)]))
        llm.generate(prompts, vllm.SamplingParams(seed=7, extra_args={"arm_weights": [0.8]}))

    LoRA adapters of the base become lanes of its forward; other ARMs run beside it. All members read the same prompt
    ids, those of the base's tokenizer and chat template.

    Args:
        base: hub id or folder of any model with full or sliding-window attention that vLLM knows.
        arms: one or several hub ids, folders, folders of LoRA adapters, or `ARM`s of these.
        weight_range: the lowest and the highest weight that a request may ask for; None for any weight.
        options: vLLM's own options, such as tensor_parallel_size, quantization, dtype. The ARMs are added to
            `hf_overrides`.

    Raises:
        TypeError: a loaded model, or an option that follows from the base.
        ValueError: an adapter of another base, or of a kind that no lane computes; an ARM with a template of its own;
            ARMs that were trained with different `chat_template_kwargs`; a name given twice; a wrong range.
        FileNotFoundError: an adapter that is found nowhere.
    """
    served, arguments = served_arguments(base, arms, weight_range=weight_range, **options)
    if trained := trained_arguments(served.arms):
        warnings.warn(
            f"ARMs were trained with chat_template_kwargs={trained!r:.200}: give `LLM.chat` the same, as"
            " `genarm-fast serve` does by itself",
            stacklevel=2,
        )
    return arguments


def served_arguments(
    base: Source,
    arms: Source | ARM | Sequence[Source | ARM],
    *,
    weight_range: tuple[float, float] | None = None,
    **options: Any,
) -> tuple[Served, dict[str, Any]]:
    """Return the ARMs as a server knows them, and the arguments that `engine_args` returns."""
    specs = as_arms(arms)
    if not specs:
        raise ValueError("arms=[]: expected an ARM at least; vLLM serves a bare base by itself")
    for name in ARGUMENTS_FROM_BASE:
        if name in options:
            raise TypeError(f"{name}={options[name]!r}: expected no such option, it follows from base={base!r}")
    if not isinstance(base, (str, os.PathLike)):
        raise TypeError(f"base={type(base).__name__}: expected a hub id or a folder, since vLLM loads it")
    served = Served(
        tuple(_served(base, index, name, spec) for index, (name, spec) in enumerate(zip(arm_names(specs), specs))),
        _checked_range(weight_range),
    )
    overrides = options.pop("hf_overrides", None) or {}
    if not isinstance(overrides, dict):
        raise TypeError(f"hf_overrides={overrides!r}: expected a dict, to which the ARMs are added")
    for name in OVERRIDE_FIELDS:
        if name in overrides:
            raise ValueError(f"hf_overrides[{name!r}]: expected no such key, engine_args writes it")
    overrides = {**overrides, "architectures": [ARCHITECTURE], **served.overrides()}
    return served, {"model": os.fspath(base), **options, "hf_overrides": overrides}


def _served(base: Source, index: int, name: str, spec: ARM) -> ServedARM:
    role = f"arms[{index}]"
    if isinstance(spec.model, nn.Module):
        raise TypeError(f"{role}={type(spec.model).__name__}: expected a hub id or a folder, since vLLM loads it")
    for template in ("prompt_template", "chat_template"):
        if getattr(spec, template) is not None:
            raise ValueError(
                f"{role}: {template}={getattr(spec, template)!r:.60}: expected none; in vLLM all members read the same"
                " prompt ids"
            )
    model, lane = os.fspath(spec.model), False
    recorded = adapted_model(role, model)
    if recorded is not None:
        model = _folder(role, model)
        check_alone(f"{role}={os.fspath(spec.model)!r}", model, recorded)
        check_lane(f"{role}={os.fspath(spec.model)!r}", model)
        same_weights(f"{role}={os.fspath(spec.model)!r}", model, recorded, base)
        lane = True
    return ServedARM(name, model, float(spec.weight), lane, spec.trust_remote_code)


def _folder(role: str, source: str) -> str:
    """Return the folder of an adapter, fetched from the hub if necessary, since each worker reads it."""
    if os.path.isdir(source):
        return str(Path(source).resolve())
    from huggingface_hub import snapshot_download

    return snapshot_download(os.fspath(locate(role, source)), allow_patterns=["adapter_*", "*.json"])


def _checked_range(limits: Any) -> tuple[float, float] | None:
    if limits is None:
        return None
    try:
        low, high = map(float, limits)
    except (TypeError, ValueError):
        raise TypeError(f"weight_range={limits!r}: expected two numbers, the lowest and the highest weight") from None
    if not low <= high:
        raise ValueError(f"weight_range={limits!r}: expected the lowest weight first, then the highest")
    return low, high
