"""LoRA on ranges of a linear's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Lora(NamedTuple):
    """A low-rank addition to a linear: scale · (x aᵀ) b."""

    a: Tensor  # [r, in], as PEFT's lora_A
    b: Tensor  # [r, out], the transpose of PEFT's lora_B: read in the order in which outputs are made
    scale: float


Span = tuple[int, int, int]  # rows first .. last - 1 get the LoRA of that index; rows are flattened
RowsLora = tuple[int, int, Tensor, Tensor, float]  # first row, last row, and a Lora


def split(loras: Sequence[RowsLora]) -> tuple[list[Lora], list[Span]]:
    """What a function takes by call, as a prepared linear and its calls take it."""
    return [Lora(*lora[2:]) for lora in loras], [(first, last, i) for i, (first, last, *_) in enumerate(loras)]
