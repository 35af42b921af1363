"""The plan that divides attention's work for a GPU."""

import pytest
import torch

from genarm_fast.kernels.ragged_attention.plan import CHUNK, DECODE, MOST_SPLITS, PROGRAMS, plan

BF16 = torch.bfloat16


def of(rows=1, kv_heads=8, group=4, block=1, widths=(128, 128), limit=4096, window=None, dtype=BF16):
    return plan(rows, kv_heads, group, block, widths, limit, window, dtype)


def test_one_request_fills_a_gpu():
    """Splits have the shortest length up to PROGRAMS programs. Beyond that they get longer."""
    assert of(limit=CHUNK).splits == 1
    assert of(limit=CHUNK + 1).splits == 2
    assert of(limit=4096).splits == 4096 // CHUNK
    assert of(limit=131072).splits * 8 >= PROGRAMS
    assert of(kv_heads=1, limit=1 << 20).splits == MOST_SPLITS


@pytest.mark.parametrize("block", [1, 4, 9, 16])
def test_splits_of_many_rows_write_little(block):
    """With enough programs, the splits' sums are at most an eighth of the memory traffic of keys and values."""
    cut = of(rows=64, block=block, limit=32768)
    assert cut.splits > 1  # rows may have different lengths
    written = 2 * 4 * 128 * cut.block_m * cut.tiles * cut.splits
    assert written <= 2 * 2 * 128 * 32768 * cut.tiles / 8


def test_a_window_bounds_the_splits():
    assert of(limit=131072, window=1024, block=4).splits == -(-1028 // CHUNK)


@pytest.mark.parametrize(("rows", "group", "block"), [(1, 1, 1), (2, 3, 5), (1, 71, 1), (3, 8, 16), (1, 4, 500)])
def test_tiles_hold_all_queries_and_heads(rows, group, block):
    cut = of(rows=rows, group=group, block=block)
    assert (cut.tiles - 1) * cut.block_m < group * block <= cut.tiles * cut.block_m
    assert cut.blocked == (block > DECODE)


@pytest.mark.parametrize("widths", [(1, 1), (80, 96), (128, 64), (576, 512), (256, 256)])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_tiles_fit(widths, dtype):
    """A stage has at most 32 KB of keys and of values. Sizes are powers of two from 16 on, as tl.dot needs."""
    cut = of(widths=widths, dtype=dtype, block=16)
    for size in (cut.block_m, cut.block_n, cut.width, cut.value_width):
        assert size >= 16
        assert size & (size - 1) == 0
    assert cut.width >= widths[0]
    assert cut.value_width >= widths[1]
    assert cut.block_n * max(cut.width, cut.value_width) * dtype.itemsize <= 65536
