"""Compares ragged_attention and ragged_append on the CPU with the sdpa path of transformers, in CPU time.

    python benchmarks/attention.py [--rounds N] [--dtype bfloat16]

The sdpa path repeats keys and values for the query heads that share them, and calls scaled_dot_product_attention under
a mask. Its cache has exactly the attended length; a static cache would be longer. One thread. The contenders take
turns, and a turn repeats calls for half a millisecond, so the processor's caches are warm for both. A table cell shows
µs to append, µs of our attention, µs of the sdpa path, and the ratio of the last two.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from itertools import product

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from genarm_fast.kernels import ragged_append, ragged_attention

SHAPES = {"SmolLM2-135M": (9, 3, 64), "2048 wide": (32, 8, 64)}  # (query heads, key-value heads, width of a head)
LENGTHS, ROWS, BLOCKS = (64, 256, 1024), (1, 2, 8), (1, 5)


def transformers_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return what sdpa_attention_forward of transformers 5 returns, mask and repeated keys and values included."""
    group = query.shape[1] // keys.shape[1]
    rows, kv_heads, length, width = keys.shape
    keys, values = (
        x[:, :, None].expand(rows, kv_heads, group, length, width).reshape(rows, kv_heads * group, length, width)
        for x in (keys, values)
    )
    out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).contiguous()


def microseconds(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return each contender's median CPU time per call, in µs. Contenders take turns of about half a millisecond."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 2):
        for name, contender in contenders.items():
            start, calls = time.process_time(), 0
            while calls == 0 or time.process_time() - start < 5e-4:
                contender()
                calls += 1
            times[name].append((time.process_time() - start) / calls * 1e6)
    return {name: statistics.median(found[2:]) for name, found in times.items()}


def measure(shape: tuple[int, int, int], length: int, rows: int, block: int, dtype: torch.dtype, rounds: int) -> str:
    heads, kv_heads, width = shape
    torch.manual_seed(0)
    keys, values = torch.randn(2, rows, kv_heads, length, width).to(dtype)
    new_keys, new_values = torch.randn(2, rows, block, kv_heads, width).to(dtype).transpose(2, 3)
    query = torch.randn(rows, block, heads, width).to(dtype).transpose(1, 2)
    slots = torch.arange(rows)
    positions = (length - block + torch.arange(block)).expand(rows, block).contiguous()
    mask = (torch.arange(length) <= positions[:, :, None])[:, None]
    scale = width**-0.5

    def append() -> None:
        ragged_append(keys, values, new_keys, new_values, slots, positions)

    def attend() -> Tensor:
        return ragged_attention(query, keys, values, slots, positions, scale=scale)

    def theirs() -> Tensor:
        return transformers_attention(query, keys, values, mask, scale)

    append()
    torch.testing.assert_close(attend(), theirs(), rtol=2e-2, atol=2e-2)
    took = microseconds({"append": append, "attend": attend, "theirs": theirs}, rounds)
    return f"{took['append']:.1f}, {took['attend']:.0f}, {took['theirs']:.0f}, {took['theirs'] / took['attend']:.1f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention over the static cache, on the CPU.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = [f"{rows} row{'s' * (rows > 1)}: append, ours, theirs, ratio" for rows in ROWS]
    print(f"| shape | length | queries | {' | '.join(cells)} |\n|{'---|' * (3 + len(ROWS))}")
    for (name, shape), length, block in product(SHAPES.items(), LENGTHS, BLOCKS):
        cells = [measure(shape, length, rows, block, getattr(torch, options.dtype), options.rounds) for rows in ROWS]
        print(f"| {name} | {length} | {block} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
