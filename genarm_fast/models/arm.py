"""What a caller says of an ARM: where its model is, its weight, its name and its templates."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from genarm_fast.models.hub import Source
from genarm_fast.models.quantized import check_quantization
from genarm_fast.params import check_weights
from genarm_fast.utils.checks import too_large

RESERVED = ("base", "ngram", "draft_model")  # names of the drafters that are not ARMs


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
            raise TypeError(f"model={self.model!r}: expected a hub id, a folder or a loaded model")
        try:
            alone = isinstance(check_weights(self.weight), float)
        except (TypeError, ValueError) as error:
            expected = f"a finite number{too_large(self.weight)}"
            raise type(error)(f"weight={self.weight!r:.80}: expected {expected}") from None
        if not alone:
            raise TypeError(f"weight={self.weight!r:.80}: expected one number")
        if self.base is not None and not isinstance(self.base, (str, os.PathLike, nn.Module)):
            raise TypeError(f"base={self.base!r:.80}: expected a hub id, a folder or a loaded model")
        if self.name is not None and not isinstance(self.name, str):
            raise TypeError(f"name={self.name!r}: expected a string")
        if not isinstance(self.trust_remote_code, bool):
            raise TypeError(f"trust_remote_code={self.trust_remote_code!r}: expected True or False")
        check_quantization("quantization", self.quantization)
        object.__setattr__(self, "active", active_adapters(self.model))


def active_adapters(model: object) -> tuple[str, ...]:
    """Return the names of a PeftModel's active adapters, or () for any other model."""
    return tuple(model.active_adapters) if hasattr(model, "get_base_model") else ()  # type: ignore[attr-defined]


def as_arms(arms: Any) -> list[ARM]:
    """Return a list of `ARM`s, made from one `ARM`, path or model, or from a list of them."""
    if isinstance(arms, (ARM, str, os.PathLike, nn.Module)):
        arms = [arms]
    if not isinstance(arms, Sequence):
        raise TypeError(f"arms={arms!r}: expected an ARM, a hub id, a folder, a loaded model, or a list of such")
    return [arm if isinstance(arm, ARM) else ARM(arm) for arm in arms]


def arm_names(specs: Sequence[ARM]) -> list[str]:
    """Return a unique name for each ARM. Given names stay as they are; default names are numbered where they repeat."""
    given = [spec.name for spec in specs if spec.name is not None]
    for name in given:
        if given.count(name) > 1 or not name:
            raise ValueError(f"name={name!r}: expected a non-empty name for each ARM, none twice")
        if name in RESERVED:
            raise ValueError(f"name={name!r}: expected another one than {', '.join(RESERVED)}, which name drafters")
    names: list[str] = []
    for spec in specs:
        stem = "arm" if isinstance(spec.model, nn.Module) else Path(spec.model).name or "arm"
        name, number = spec.name or stem, 2
        while spec.name is None and name in (*names, *given, *RESERVED):
            name, number = f"{stem}{number}", number + 1
        names.append(name)
    return names
