"""The peer vLLM on the CPU: the base alone, with vLLM's engine in this process."""

from __future__ import annotations

import os

from answering import Decode, answer


def load(base: str, threads: int, rows: int) -> Decode:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    model = LLM(base, dtype="bfloat16", max_num_seqs=rows, max_model_len=2048, enable_prefix_caching=False)

    def decode(prompts: list[list[int]], tokens: int, seed: int) -> int:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=seed)
        found = model.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in found)

    return decode


if __name__ == "__main__":
    answer(load)
