"""The parts that small_linear and quant_linear share: LoRA on rows, checks, the C++ core, linears over one input."""

from .lora import Lora, Span
from .siblings import SiblingLinears

__all__ = ["Lora", "SiblingLinears", "Span"]
