"""What small_linear and quant_linear share: LoRA on ranges of rows, checks, the C++ core, linears of one input."""

from .lora import Lora, Span
from .siblings import SiblingLinears

__all__ = ["Lora", "SiblingLinears", "Span"]
