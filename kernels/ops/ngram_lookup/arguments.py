"""The checks of ngram_lookup's arguments."""

from __future__ import annotations

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32)


def check(tokens: Tensor, lengths: Tensor, k: int, max_n: int, min_n: int) -> None:
    """Check the arguments. Raises TypeError or ValueError that names the argument.

    The values of lengths are not read, since that would wait for the device.
    """
    if tokens.ndim != 2:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)}: expected [R, H]")
    if lengths.shape != tokens.shape[:1]:
        raise ValueError(f"lengths of shape {tuple(lengths.shape)}: expected {tuple(tokens.shape[:1])}, by tokens")
    for name, tensor in (("tokens", tokens), ("lengths", lengths)):
        if tensor.dtype not in INTEGERS:
            raise TypeError(f"{name} of dtype {tensor.dtype}: expected torch.int64")
    if lengths.device != tokens.device:
        raise ValueError(f"lengths on {lengths.device}: expected {tokens.device}, where tokens are")
    if k < 0:
        raise ValueError(f"k={k}: expected an integer >= 0")
    if not 1 <= min_n <= max_n:
        raise ValueError(f"min_n={min_n}, max_n={max_n}: expected 1 <= min_n <= max_n")
