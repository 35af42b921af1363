"""Helpers that run coroutines with a time limit and wait for conditions."""

from __future__ import annotations

import asyncio
import time

from genarm_fast import SamplingParams

PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True, seed=1)


def run(coroutine, seconds=60):
    """Return the coroutine's result; raise TimeoutError after `seconds` instead of hanging."""
    return asyncio.run(asyncio.wait_for(coroutine, seconds))


async def until(condition, seconds=20):
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end
        await asyncio.sleep(0.001)


async def tokens_of(stream):
    return [token async for chunk in stream for token in chunk.token_ids]


async def leave_by_break(stream):
    async for _ in stream:
        break


def raising(input_ids, scores):
    raise LookupError("no such token")
