"""Kernels of guided decoding, which also work without the engine. They take and return tensors. Each op is a folder.

In an op's folder, __init__.py has the public function and reference.py the specification. triton*.py has the kernels
for GPUs, cpu.py the call into the C++ core, and custom_op.py the node in the graphs of torch.compile. `_dispatch`
chooses the implementation that serves a call.
"""

from ._product import Lanes
from .add_rms_norm import add_rms_norm
from .arm_logps import arm_logps, arm_logps_reference
from .gated_mul import gated_mul
from .guided_sample import GuidedSample, guided_sample, guided_sample_reference
from .linear import Lora, SiblingLinears
from .ngram_lookup import ngram_lookup, ngram_lookup_reference
from .philox import gumbel, seed_tensor
from .quant_linear import QuantLinear, QuantWeight, quant_linear, quant_linear_reference
from .ragged_attention import (
    ragged_append,
    ragged_append_reference,
    ragged_attention,
    ragged_attention_reference,
)
from .rms_norm import rms_norm, rms_norm_reference
from .rotary import rotary, rotary_reference
from .rotary_append import rotary_append
from .settle import Settled, settle, settle_reference
from .silu_mul import silu_mul, silu_mul_reference
from .small_linear import SmallLinear, small_linear, small_linear_reference

__all__ = [
    "GuidedSample",
    "Lanes",
    "Lora",
    "QuantLinear",
    "QuantWeight",
    "Settled",
    "SiblingLinears",
    "SmallLinear",
    "add_rms_norm",
    "arm_logps",
    "arm_logps_reference",
    "gated_mul",
    "guided_sample",
    "guided_sample_reference",
    "gumbel",
    "ngram_lookup",
    "ngram_lookup_reference",
    "quant_linear",
    "quant_linear_reference",
    "ragged_append",
    "ragged_append_reference",
    "ragged_attention",
    "ragged_attention_reference",
    "rms_norm",
    "rms_norm_reference",
    "rotary",
    "rotary_append",
    "rotary_reference",
    "seed_tensor",
    "settle",
    "settle_reference",
    "silu_mul",
    "silu_mul_reference",
    "small_linear",
    "small_linear_reference",
]
