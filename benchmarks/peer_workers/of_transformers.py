"""The peer Hugging Face: `generate` of transformers over the base alone."""

from __future__ import annotations

from typing import Any

import torch
from answering import Decode, answer
from transformers import AutoModelForCausalLM


def load(base: str, threads: int, rows: int, dtype: str, gguf: str | None = None) -> Decode:
    torch.set_num_threads(threads)
    options: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, dtype), trust_remote_code=False, **options
    ).eval()

    def decode(prompts: list[list[int]], tokens: int, seed: int) -> int:
        torch.manual_seed(seed)
        ids = torch.tensor(prompts)
        limits = {"min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, **limits)
        return found[:, ids.shape[1] :].numel()

    return decode


if __name__ == "__main__":
    answer(load)
