"""Exact guided decoding with autoregressive reward models (GenARM, arXiv 2410.08193)."""

__version__ = "0.1.0"
