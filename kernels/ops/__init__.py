"""Kernels of guided decoding, usable alone: tensors in, tensors out (one op per file)."""

from .guided_sample import GuidedSample, guided_sample, guided_sample_reference
from .philox import gumbel, seed_tensor
from .settle import Settled, settle

__all__ = ["GuidedSample", "Settled", "guided_sample", "guided_sample_reference", "gumbel", "seed_tensor", "settle"]
