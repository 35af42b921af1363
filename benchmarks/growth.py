"""Decoding over rows, and prompts over their length, in every way of holding a model's weights on the CPU.

    python benchmarks/growth.py [MODEL] [--rows N ...] [--prompts TOKENS ...] [--ways WAY ...] [--steps N] [--turns N]

Default: the demo's base. A cell: CPU milliseconds of a decode step with so many rows, or of a prompt; medians of turns,
in which the ways follow each other; one thread, no drafts. No dtype should be slower than the best of the others by
more than a tenth, for any number of rows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from quantization import decode

from genarm_fast import GenARM, demo

WAYS: dict[str, tuple[torch.dtype, str | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    **{way: (torch.bfloat16, way) for way in ("exact", "int8", "int4")},
}


def prefill(model: GenARM, prompt: list[int]) -> float:
    """CPU milliseconds of a prompt, and of the one token that it gives."""
    start = time.process_time()
    model.generate([prompt], max_new_tokens=1, temperature=0.0, ignore_eos=True)
    return (time.process_time() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or hub id (default: the demo's base)")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--prompts", type=int, nargs="*", default=[100, 1000], help="tokens of a prompt")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["float32", "bfloat16", "exact", "int8"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source, most = options.model or demo.base(), max([1, *options.rows])
    models = {
        way: GenARM.from_pretrained(
            source, dtype=WAYS[way][0], device="cpu", quantization=WAYS[way][1], max_batch_size=most, speculation="off"
        )
        for way in options.ways
    }
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(100, 10000, (max([24, *options.prompts]) + most,), generator=generator).tolist()
    times: dict[str, dict[str, list[float]]] = {way: {} for way in models}
    for _ in range(options.turns):
        for rows in options.rows:
            prompts = [tokens[i : i + 24] for i in range(rows)]
            for way, model in models.items():
                times[way].setdefault(f"{rows} rows", []).append(decode(model, prompts, options.steps)[0])
        for length in options.prompts:
            for way, model in models.items():
                times[way].setdefault(f"prompt of {length}", []).append(prefill(model, tokens[:length]))
    columns = list(next(iter(times.values())))
    print(f"| CPU ms | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for way, found in times.items():
        print(f"| {way} | {' | '.join(f'{statistics.median(found[column]):.1f}' for column in columns)} |")


if __name__ == "__main__":
    main()
