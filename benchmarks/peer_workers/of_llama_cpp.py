"""The peer llama.cpp: greedy decoding of the base alone, by llama-cpp-python's low-level calls.

    python of_llama_cpp.py SOURCE.gguf TARGET.gguf Q8_0     writes a model's file in another format

llama-cpp-python's high-level class holds one sequence only. So this script calls `llama_decode` with a batch of
several rows, as llama.cpp's server does.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp as llama
import numpy as np
from answering import Decode, answer

BATCH = 2048
CONTEXT = 2048  # most tokens of a row


def quantize(source: str, target: str, name: str) -> None:
    """Write `target` in the format `name`. A quantised source is allowed: that serves to measure speed, not quality."""
    options = llama.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{name}"), True
    if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options)):
        raise RuntimeError(f"{target}: llama.cpp could not quantise {source} to {name}")


def load(model: str, threads: int, rows: int) -> Decode:
    weights = llama.llama_model_load_from_file(model.encode(), llama.llama_model_default_params())
    if not weights:
        raise RuntimeError(f"{model}: llama.cpp could not load it")
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max = CONTEXT * rows, rows
    settings.n_batch = settings.n_ubatch = BATCH
    settings.n_threads = settings.n_threads_batch = threads
    context = llama.llama_init_from_model(weights, settings)
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(weights))
    batch = llama.llama_batch_init(BATCH, 0, 1)

    def step(entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Feed entries (token, position, row, whether its next token is wanted) and return the wanted next tokens."""
        batch.n_tokens = len(entries)
        for i, (token, position, row, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        if llama.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        logits = (llama.llama_get_logits_ith(context, i) for i, entry in enumerate(entries) if entry[3])
        return [int(np.ctypeslib.as_array(row, (vocab,)).argmax()) for row in logits]

    def decode(prompts: list[list[int]], tokens: int, seed: int) -> int:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        last = []
        for row, ids in enumerate(prompts):
            last += step([(token, i, row, i + 1 == len(ids)) for i, token in enumerate(ids)])
        for k in range(tokens - 1):
            last = step([(token, len(ids) + k, row, True) for row, (token, ids) in enumerate(zip(last, prompts))])
        return tokens * len(prompts)

    return decode


if __name__ == "__main__":
    llama.llama_backend_init()
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    if sys.argv[1:]:
        quantize(*sys.argv[1:])
    else:
        answer(load)
