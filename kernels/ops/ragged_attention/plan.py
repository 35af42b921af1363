"""Divide the work of ragged_attention for a GPU. The host knows only shapes and a bound on positions.

A tile's rows are the queries of a block times the heads that share a key-value head, because all of them read the same
keys. Few tiles leave most of a GPU idle. So the entries of each tile are split over several programs. The last program
to end combines their results. Without `arrivals`, where programs count themselves, a second kernel does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

DECODE = 16  # most queries in a row of a decode or verify step; a row with more is prefill
PROGRAMS = 512  # programs that fill a GPU: about four for each of an H100's 132 multiprocessors
CHUNK = 256  # fewest entries of a split: 128 KB of keys and values for 16-bit heads of 128
MOST_SPLITS = 128
TILE_BYTES = 16384  # keys of one turn: two stages of keys and values take 64 KB, all that a program has on gfx942
FLOAT32_BYTES = 8192  # keys of one turn in float32, where products take more registers: 16384 spilled on sm_80


class Plan(NamedTuple):
    """The constants of a launch.

    block_m: rows of a tile.
    block_n: entries of one turn of a program's loop.
    width, value_width: widths of a key and a value, raised to powers of two of at least 16, as tensor cores need.
    tiles: tiles for each row and key-value head.
    splits: programs for each tile.
    chunk: fewest entries of a split.
    blocked: whether entries that all queries of a tile see are read without masks: in prefill without a window.
    warps: warps of a program.
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
    """Return the smallest power of two that is at least `number`."""
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
    """Return the plan for `rows` rows of `block` queries, with positions below `limit`.

    group: query heads for each key-value head; widths: of a key and of a value.
    """
    width, value_width = (max(16, power_of_two(each)) for each in widths)
    widest, size = max(width, value_width), dtype.itemsize
    folded, prefill = block * group, block > DECODE
    # block_m x value_width float32 sums stay in registers. Larger tiles of these widths spilled on sm_80.
    most = 16 if widest > 256 or size == 4 else 32 if widest > 128 else 64
    block_m = min(most, max(16, power_of_two(folded)))
    tile_bytes = FLOAT32_BYTES if size == 4 else TILE_BYTES
    # With 64 entries in a turn, tiles of 64 rows of width 64 spilled on sm_80.
    block_n = min(32 if prefill or (block_m == 64 and widest < 128) else 64, max(16, tile_bytes // (widest * size)))
    tiles = -(-folded // block_m)
    span = limit if window is None else min(limit, window + block)
    # There are enough splits to fill the GPU. Decoding has more, to balance rows of unequal lengths. Their number is
    # limited so that writing and reading the splits' sums, 8 bytes for each, is at most an eighth of the traffic.
    programs = max(1, rows * kv_heads * tiles)
    fill, cheap = -(-PROGRAMS // programs), span // (16 * block_m)
    splits = max(1, min(-(-span // CHUNK), max(fill, 0 if prefill else cheap), MOST_SPLITS))
    # With 4 warps, tiles of 9 or more rows of width 128 spilled on sm_90 or sm_100.
    warps = 8 if folded > 8 or prefill or size == 4 or widest > 128 else 4
    blocked = prefill and window is None
    return Plan(block_m, block_n, width, value_width, tiles, splits, CHUNK, blocked, warps)
