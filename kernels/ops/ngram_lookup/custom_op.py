"""ngram_lookup as a custom op: one node in a compiled or exported graph."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _custom_op


def _fake(tokens: Tensor, lengths: Tensor, k: int, max_n: int, min_n: int) -> Tensor:
    return tokens.new_empty((tokens.shape[0], k), dtype=torch.int64)


call = _custom_op.define("ngram_lookup(Tensor tokens, Tensor lengths, int k, int max_n, int min_n) -> Tensor", _fake)
