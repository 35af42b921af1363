"""The peer genarm_fast: a base with or without ARMs, with the weight format that the options name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from answering import Decode, answer

from genarm_fast import GenARM


def load(
    base: str,
    threads: int,
    rows: int,
    arms: Sequence[str] = (),
    quantization: str | None = None,
    gguf: str | None = None,
) -> Decode:
    torch.set_num_threads(threads)
    options: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    model = GenARM.from_pretrained(
        base, list(arms), dtype=torch.bfloat16, quantization=quantization, max_batch_size=rows, **options
    )

    def decode(prompts: list[list[int]], tokens: int, seed: int) -> int:
        found = model.generate(prompts, max_new_tokens=tokens, ignore_eos=True, seed=seed)
        return sum(len(output.token_ids) for output in found)

    return decode


if __name__ == "__main__":
    answer(load)
