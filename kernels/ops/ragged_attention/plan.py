"""How the work of ragged_attention is cut for a GPU, from what the host knows: shapes and a bound on positions.

A tile has the queries of a block times the heads that share a key-value head, since all of them read the same keys. Few
tiles leave most of a GPU idle, so each row's entries are split over programs. The last one to end combines what they
give, or a second kernel where nothing counts them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

DECODE = 16  # most queries a row of a decode or verify step; more are prefill
PROGRAMS = 512  # about four for each of an H100's 132 multiprocessors
CHUNK = 256  # fewest entries of a split: 128 KB of keys and values for 16-bit heads of 128
MOST_SPLITS = 128
TILE_BYTES = 16384  # of keys: two stages of keys and values are 64 KB, as much as gfx942 has for a program
FLOAT32_BYTES = 8192  # the same of float32, whose products take more registers: with 16384 one token spilled on sm_80


class Plan(NamedTuple):
    """The constants of a launch. block_m: rows of a tile; block_n: entries of one turn of its loop.

    width, value_width: powers of two, at least 16, which tensor cores need. chunk: fewest entries of a split.
    blocked: queries are many and see all before them: entries that a whole tile sees are read without masks.
    """

    block_m: int
    block_n: int
    width: int
    value_width: int
    tiles: int
    splits: int
    chunk: int
    blocked: bool
    warps: int


def power_of_two(number: int) -> int:
    """The least one that is not below."""
    return 1 << max(number - 1, 0).bit_length()


def plan(
    rows: int,
    kv_heads: int,
    group: int,
    block: int,
    widths: tuple[int, int],
    limit: int,
    window: int | None,
    dtype: torch.dtype,
) -> Plan:
    """The plan for `rows` rows of `block` queries, `group` query heads a key-value head, positions below `limit`."""
    width, value_width = (max(16, power_of_two(each)) for each in widths)
    widest, size = max(width, value_width), dtype.itemsize
    folded, prefill = block * group, block > DECODE
    # block_m x value_width float32 sums stay in registers: larger tiles of these widths spilled on sm_80.
    most = 16 if widest > 256 or size == 4 else 32 if widest > 128 else 64
    block_m = min(most, max(16, power_of_two(folded)))
    tile_bytes = FLOAT32_BYTES if size == 4 else TILE_BYTES
    block_n = min(32 if prefill or (block_m == 64 and widest < 128) else 64, max(16, tile_bytes // (widest * size)))
    tiles = -(-folded // block_m)
    span = limit if window is None else min(limit, window + block)
    # Enough to fill the GPU. Beyond it, splits that balance rows of unequal lengths, so long that what they write and
    # what is read again, 8 bytes a sum, stays below an eighth of the traffic.
    programs = max(1, rows * kv_heads * tiles)
    fill, cheap = -(-PROGRAMS // programs), span // (16 * block_m)
    splits = max(1, min(-(-span // CHUNK), max(fill, 0 if prefill else cheap), MOST_SPLITS))
    # With 4, 9 rows and more of widths of 128 spilled on sm_90 or sm_100; with 64 entries, 64 rows of 64 on sm_80.
    warps = 8 if folded > 8 or prefill or size == 4 or widest > 128 else 4
    blocked = prefill and window is None
    return Plan(block_m, block_n, width, value_width, tiles, splits, CHUNK, blocked, warps)
