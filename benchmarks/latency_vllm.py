"""vLLM's part of latency.py, which imports this module: vLLM's own engine, unguided, on the CPU."""

from __future__ import annotations

import itertools
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def vllm_engine(source: str, callers: int, length: int) -> Iterator[Any]:
    """Yield a vLLM engine for `callers` requests at once, each of `length` tokens with its prompt.

    Enter it in the event loop that sends the requests."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its log goes to stdout, where --json writes
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    limits: Any = {"max_model_len": length, "max_num_seqs": callers, "kv_cache_memory_bytes": 1 << 30}
    plain: Any = {"dtype": "bfloat16", "enforce_eager": True, "enable_prefix_caching": False}
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=source, disable_log_stats=True, **limits, **plain))
    try:
        yield engine
    finally:
        engine.shutdown()


def by_vllm(
    engine: Any, prompt_of: Callable[[int], list[int]], tokens: int
) -> Callable[[int, Callable[[], None]], Awaitable[None]]:
    """Return a `Request` of latency.py. A chunk is usually one token, and more if its reader lags."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    names = map(str, itertools.count())

    async def request(number: int, mark: Callable[[], None]) -> None:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=number, output_kind=RequestOutputKind.DELTA)
        async for _ in engine.generate({"prompt_token_ids": prompt_of(number)}, params, request_id=next(names)):
            mark()

    return request
