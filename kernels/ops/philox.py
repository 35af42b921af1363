"""The random-number contract: Gumbel noise as a pure function of (seed, level, position, index).

Philox 4x32-10 (Salmon et al., SC 2011, doi 10.1145/2063384.2063405) with

    key     = (seed mod 2^32, seed div 2^32)
    counter = (index, position, level, 0)         level 0: tiles, level 1: tokens

and b is the first of the four output words. The other three are not used.

    u = min((float32(b) + 0.5) · 2^-32, 1 - 2^-24)      uniform on (0, 1), every one of the 32 bits counts
    w = 1 - u;  E = u if w = 1 else -log(w) · u / (1 - w)   = -log1p(-u), from log alone: exact where u is tiny
    G = -log(E)

All of this is in float32. A large G comes from a small u, which float32 resolves down to 2^-33. A vocabulary of 128k
tokens needs that tail.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_LEVEL, TOKEN_LEVEL = 0, 1
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF


def as_int64(seed: int) -> int:
    """Return the int64 with the same bits as a seed 0..2^64-1, because torch has few operations for uint64."""
    return seed - (1 << 64) if seed >> 63 else seed


def seed_tensor(seeds: list[int], device: torch.device | str | None = None) -> Tensor:
    """Return seeds 0..2^64-1 as an int64 tensor [R] with the same 64 bits. Raises ValueError for other seeds."""
    for seed in seeds:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed {seed}: expected 0..{(1 << 64) - 1}")
    return torch.tensor(list(map(as_int64, seeds)), dtype=torch.int64, device=device)


def philox(counter: tuple[Tensor | int, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the four 32-bit words of Philox 4x32-10, held in int64 tensors, for broadcastable counters and keys."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, device=key[0].device) for c in counter))
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2^64, so both halves of the unsigned product are right after masking.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & MASK32) ^ c1 ^ k0,
            product1 & MASK32,
            (product0 >> 32 & MASK32) ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0, k1 = k0 + KEY_STEPS[0] & MASK32, k1 + KEY_STEPS[1] & MASK32
    return c0, c1, c2, c3


def gumbel(seeds: Tensor, level: int, positions: Tensor, indices: Tensor) -> Tensor:
    """Return standard Gumbel noise, float32, in the broadcast shape of the int64 `seeds`, `positions` and `indices`.

    level: `TILE_LEVEL` or `TOKEN_LEVEL`.
    """
    seeds, positions, indices = torch.broadcast_tensors(seeds, positions, indices)
    bits = philox((indices & MASK32, positions & MASK32, level, 0), (seeds & MASK32, seeds >> 32 & MASK32))[0]
    u = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24)
    w = 1 - u
    exponential = torch.where(w == 1, u, -w.log() * u / (1 - w))
    return -exponential.log()
