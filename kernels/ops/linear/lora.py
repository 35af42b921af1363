"""LoRA on ranges of a linear's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Lora(NamedTuple):
    """A low-rank addition to a linear: scale · (x aᵀ) b."""

    a: Tensor  # [r, in], like PEFT's lora_A
    b: Tensor  # [r, out], the transpose of PEFT's lora_B, because the core then reads it in the order of the outputs
    scale: float


# (first, last, index): rows first .. last - 1 of the flattened input get the LoRA of this index.
Span = tuple[int, int, int]
RowsLora = tuple[int, int, Tensor, Tensor, float]  # (first, last, a, b, scale): a span and its LoRA in one tuple


def split(loras: Sequence[RowsLora]) -> tuple[list[Lora], list[Span]]:
    """Split the `loras` of one function call into the LoRAs of a prepared linear and the spans of its call."""
    return [Lora(*lora[2:]) for lora in loras], [(first, last, i) for i, (first, last, *_) in enumerate(loras)]
