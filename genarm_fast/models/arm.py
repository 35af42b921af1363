"""The caller's description of an ARM: where its model is, its weight, its name and its templates."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from genarm_fast.models.hub import Source
from genarm_fast.models.quantized import check_quantization
from genarm_fast.params import check_weights
from genarm_fast.utils.checks import check_flag, shown, too_large
from genarm_fast.utils.names import unique_names

MODEL = "a hub id, a folder or a loaded model"
SAID = "; ARM(model, weight=..., name=...) takes an ARM's weight and name"


@dataclass(frozen=True)
class ARM:
    """An autoregressive reward model: a causal LM whose log-probability of a token is the token's reward.

    Args:
        model: hub id, local folder, folder of a PEFT adapter, or a loaded model (never modified; used in eval mode).
        weight: default weight, the paper's 1/β; any finite real number. A request's `weights` override it.
        name: the name under which the outputs report this ARM's rewards; default: the last part of the model's path.
        prompt_template: text that wraps raw string prompts, e.g. "<|user|>\\n{prompt}\\n<|assistant|>\\n".
        chat_template: Jinja template for chat messages; default: the template of the ARM's tokenizer.
        base: the model that an adapter belongs to, instead of the base that its folder names: hub id, folder or loaded
            model.
        trust_remote_code: whether to run Python code that the ARM's folder or repository contains; default: it never
            runs.
        quantization: how the ARM's own weights are held: "exact", "int8" or "int4". None: as the `quantization` of
            `from_pretrained` says.

    Templates default to those that training recorded in the folder's genarm.json. An ARM without tokenizer files takes
    the base's tokenizer and chat template.
    """

    model: Source | nn.Module
    weight: float = field(default=1.0, kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    prompt_template: str | None = field(default=None, kw_only=True)
    chat_template: str | None = field(default=None, kw_only=True)
    base: Source | nn.Module | None = field(default=None, kw_only=True)
    trust_remote_code: bool = field(default=False, kw_only=True)
    quantization: str | None = field(default=None, kw_only=True)
    # The adapters that were active in a given PeftModel when this ARM was made. Loading refuses the model if they
    # changed.
    active: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.model, (str, os.PathLike, nn.Module)):
            raise TypeError(f"model={shown(self.model)}: expected {MODEL}")
        try:
            alone = isinstance(check_weights(self.weight), float)
        except (TypeError, ValueError) as error:
            expected = f"a finite number{too_large(self.weight)}"
            raise type(error)(f"weight={self.weight!r:.80}: expected {expected}") from None
        if not alone:
            raise TypeError(f"weight={self.weight!r:.80}: expected one number")
        if self.base is not None and not isinstance(self.base, (str, os.PathLike, nn.Module)):
            raise TypeError(f"base={shown(self.base)}: expected {MODEL}")
        if self.name is not None and not isinstance(self.name, str):
            raise TypeError(f"name={shown(self.name)}: expected a string")
        object.__setattr__(self, "trust_remote_code", check_flag("trust_remote_code", self.trust_remote_code))
        check_quantization("quantization", self.quantization)
        object.__setattr__(self, "active", active_adapters(self.model))


def active_adapters(model: object) -> tuple[str, ...]:
    """Return the names of a PeftModel's active adapters, or () for any other model."""
    return tuple(model.active_adapters) if hasattr(model, "get_base_model") else ()  # type: ignore[attr-defined]


def as_arms(arms: Any) -> list[ARM]:
    """Return a list of `ARM`s, made from one `ARM`, path or model, or from a list of them.

    Raises:
        TypeError: a value of another type. The message names the value's index in the list.
    """
    if isinstance(arms, (ARM, str, os.PathLike, nn.Module)):
        arms = [arms]
    if not isinstance(arms, Sequence):
        hint = SAID if isinstance(arms, Mapping) else ""
        raise TypeError(f"arms={shown(arms)}: expected an ARM, {MODEL}, or a list of such{hint}")
    for index, arm in enumerate(arms):
        if not isinstance(arm, (ARM, str, os.PathLike, nn.Module)):
            hint = SAID if isinstance(arm, (tuple, list, Mapping)) else ""
            raise TypeError(f"arms[{index}]={shown(arm)}: expected an ARM, {MODEL}{hint}")
    return [arm if isinstance(arm, ARM) else ARM(arm) for arm in arms]


def arm_names(specs: Sequence[ARM]) -> list[str]:
    """Return a unique name for each ARM: given names as they are, default names numbered where they repeat.

    Raises:
        ValueError: a given name that is empty, used twice, or the name of another drafter.
    """
    paths = [None if isinstance(spec.model, nn.Module) else os.fspath(spec.model) for spec in specs]
    return unique_names([spec.name for spec in specs], paths)
