"""Warm-up: it makes caches, memory pages, graphs and kernels before the first request, which would wait for them.

It decodes short made-up requests like any others. On devices that capture graphs, it also launches steps and forwards
that these requests do not reach: other lengths of the cache, and other numbers of drafts. Of steps that are one launch,
it captures those without filters, bias and log-probabilities. Others are captured when a request needs them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch

from genarm_fast.engine.batch import Batch
from genarm_fast.engine.engine import Engine
from genarm_fast.engine.sequence import Request
from genarm_fast.engine.step_graph import Shadows
from genarm_fast.params import SamplingParams
from genarm_fast.speculation.config import DEFAULT_TUNER_CONFIG, OFF, Speculation
from genarm_fast.speculation.drafter import Drafter
from genarm_fast.utils.checks import check_integer


class EngineBusy(RuntimeError):
    """Error raised when requests are running, since `warm_up` needs the engine for itself."""


STEPS_PER_REQUEST = 3  # steps of a request before it is taken out; 128 would take seconds and compile nothing new
DEFAULT_LENGTH = 128  # tokens of a prompt, and of a response
# Parameters of a second kind of request: filters, log-probabilities and rewards have kernels of their own on a GPU.
VARIED_PARAMS: dict[str, Any] = {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "logprobs": 1, "rewards": True}


def warm_up(
    engine: Engine,
    prepare: Callable[..., list[Request]],
    speculation: Speculation,
    batch_sizes: int | Sequence[int],
    prompt_tokens: int | None,
    max_new_tokens: int | None,
) -> None:
    """Make an engine ready for batches of these sizes, of requests up to this length that use every ARM.

    prepare: makes requests from prompts and parameters. speculation: the setting that requests will ask for.

    Raises:
        TypeError, ValueError: a limit is wrong, before any work; or the engine can't run a model.
        MemoryError: the caches take more than the free memory, or than cache_bytes.
        EngineBusy: a RuntimeError; requests are running or waiting.
    """
    sizes = _sizes(batch_sizes, engine.config.max_batch_size)
    prompt, new = _lengths(engine, prompt_tokens, max_new_tokens)
    params = SamplingParams(weights=1.0, max_new_tokens=new, ignore_eos=True, seed=0)
    kinds = [(params, OFF)]
    if engine.executor.device.launches_to_capture:  # such a device compiles kernels at their first call
        kinds.append((params.override(**VARIED_PARAMS), OFF))
        kinds += [(params, Speculation(each.names[0], speculation.most)) for each in _drafters(engine, speculation)]
    vocab_size = engine.steps.sampler.vocab_size
    prompts = [[(row + i) % vocab_size for i in range(prompt)] for row in range(sizes[0])]
    if speculation.k is None and _drafters(engine, speculation):  # a tuner times every way to draft at these sizes
        kinds.append((params, speculation))
    requests = {(size, k): prepare(prompts[:size], kinds[k][0]) for size in sizes for k in range(len(kinds))}
    longest, workspace = prompt + new + speculation.most, engine.workspace
    kept, workspace.warm_up_bytes = workspace.warm_up_bytes, inf  # runs that end meanwhile free no caches
    try:
        with engine.executor.device.keeping_graphs():
            _reserve(engine, sizes[0], longest, drafting=speculation.most > 0)
            with engine.tuners.learning_costs_alone():
                for (_, k), group in requests.items():
                    _run(engine, group, kinds[k][1])
            _launch_forwards(engine, sizes[0], longest, speculation.most)
            _launch_steps(engine, prepare(prompts, params), longest, speculation)
        kept = max(kept, workspace.bytes)
    finally:
        workspace.warm_up_bytes = kept
    # The first collection after imports and loading takes 0.4 s. It runs here, so that no request waits for it.
    gc.collect()


def _sizes(batch_sizes: Any, most: int) -> list[int]:
    """Return the checked batch sizes, the largest first: caches that are made for it suffice for the others."""
    given = batch_sizes if isinstance(batch_sizes, Sequence) else [batch_sizes]
    expected = f"integers in 1..{most}, which is max_batch_size"
    sizes = {check_integer("batch_sizes", size, expected, 1, high=most) for size in given}
    if not sizes:
        raise ValueError(f"batch_sizes={batch_sizes!r}: expected {expected}, at least one")
    return sorted(sizes, reverse=True)


def _lengths(engine: Engine, prompt_tokens: int | None, max_new_tokens: int | None) -> tuple[int, int]:
    """Return the tokens of prompts and of responses: by default 128 each, or fewer for a small context."""
    context = min((member.context for member in engine.executor.members if member.context), default=None)
    if context is not None and context < 2:
        raise ValueError(f"context={context}: expected 2 tokens, of a prompt and of a response")
    if max_new_tokens is None:
        max_new_tokens = DEFAULT_LENGTH if context is None else min(DEFAULT_LENGTH, context // 2)
    new = check_integer("max_new_tokens", max_new_tokens, "None or an integer >= 1", 1)
    if prompt_tokens is None:
        prompt_tokens = DEFAULT_LENGTH if context is None else max(min(DEFAULT_LENGTH, context - new), 1)
    prompt = check_integer("prompt_tokens", prompt_tokens, "None or an integer >= 1", 1)
    if context is not None and prompt + new > context:
        raise ValueError(
            f"prompt_tokens={prompt}, max_new_tokens={new}: expected at most {context} tokens, the context"
        )
    return prompt, new


@torch.inference_mode()
def _reserve(engine: Engine, slots: int, capacity: int, *, drafting: bool) -> None:
    """Make the caches, which also checks models that were not checked before."""
    executor, workspace = engine.executor, engine.workspace
    members = {m for m in range(len(executor.members)) if drafting or m != executor.draft_model}
    with engine.turns.take():
        engine.expire()
        if engine.scheduler:
            raise EngineBusy("warm_up: expected no requests that are running")
        executor.refresh()
        workspace.reserve(members, slots, capacity, 0, engine.config.cache_bytes)
    if workspace.slots < slots or not workspace.holds(members, capacity):
        limit = engine.config.cache_bytes
        taken = slots * capacity * workspace.token_bytes(members)
        why = "out of memory" if limit is None else f"expected at most cache_bytes={limit:,}"
        raise MemoryError(f"{slots} x {capacity} tokens take {taken:,} bytes of cache: {why}") from workspace.failure


def _drafters(engine: Engine, speculation: Speculation) -> list[Drafter]:
    """Return the drafters that may draft with this setting, as `DraftPolicy` chooses them."""
    drafters = [each for each in engine.drafters if speculation.drafter in (None, *each.names)]
    return drafters[: None if speculation.k is None else 1] if speculation.most else []


def _run(engine: Engine, requests: list[Request], speculation: Speculation) -> None:
    """Decode STEPS steps of requests, or more if a tuner has ways to draft to time. Raises the error of a sequence."""
    sequences = [sequence for request in requests for sequence in request.sequences(engine.tokenizer, speculation)]
    ways = len(DEFAULT_TUNER_CONFIG.warm_drafts) * len(_drafters(engine, speculation)) if speculation.k is None else 0
    with engine.run(sequences) as run:
        for _ in run:
            if all(sequence.ended or sequence.steps >= STEPS_PER_REQUEST + 2 * ways for sequence in sequences):
                break
    for sequence in sequences:
        if sequence.error is not None:
            raise sequence.error


@torch.inference_mode()
def _launch_forwards(engine: Engine, rows: int, longest: int, drafts: int) -> None:
    """Write to every page of the caches, and capture graphs of every shape that a forward of all lanes may have."""
    executor, device = engine.executor, engine.executor.device
    with engine.turns.take():
        if engine.scheduler:
            raise EngineBusy("warm_up: expected no requests that are running")
        engine.scheduler.forget_prompts()
        for slot in engine.scheduler.free_slots():
            executor.clear(slot)
        for g, runner in enumerate(executor.runners):
            if not (runner.slots and runner.on_one_device and device.launches_to_capture):
                continue
            lanes = list(range(len(runner.members)))
            widths = 1 if executor.draft_model in executor.groups[g] else 1 + drafts
            counts = {device.shape(n, runner.slots, 1, runner.capacity)[0] for n in range(1, rows + 1)}
            bounds = {device.shape(1, runner.slots, n, runner.capacity)[1] for n in range(1, longest + 1)}
            for count, bound, width in ((n, b, w) for n in counts for b in bounds for w in range(1, widths + 1)):
                positions = torch.arange(width).expand(len(lanes), count, width)
                inputs = [device.upload(each, runner.stream) for each in (torch.zeros_like(positions), positions)]
                for _ in range(device.launches_to_capture):
                    executor.launch(runner.stream, "warm up", runner.forward, *inputs, list(range(count)), bound, lanes)
        device.finish()


@torch.inference_mode()
def _launch_steps(engine: Engine, requests: list[Request], longest: int, speculation: Speculation) -> None:
    """Capture graphs of steps, for every number of rows, every KV bound, and every number of drafts."""
    executor, steps, device = engine.executor, engine.steps, engine.executor.device
    sequences = [sequence for request in requests for sequence in request.sequences(engine.tokenizer, OFF)]
    active = tuple(range(len(executor.members) if executor.draft_model is None else executor.draft_model))
    drafters = _drafters(engine, speculation)
    plans: list[tuple[Drafter | None, int, Shadows]] = [(None, 0, ())]
    for each in drafters:
        plans += [(each, k, ()) for k in (range(1, speculation.most + 1) if speculation.k is None else [speculation.k])]
    if speculation.k is None:  # a tuner also judges drafters that do not draft in a step
        shadows = [each for each in drafters if each.members and set(each.members) <= set(active)]
        judged = [(each, k, tuple(s.members for s in shadows if s is not each)) for each, k, _ in plans]
        plans += [plan for plan in judged if plan[2]]
    text_width = steps.text_width if any(each.reads_texts for each in drafters) else 0
    with engine.turns.take():
        if not steps.graph.can_capture(tuple(sorted({*active, *(m for each in drafters for m in each.members)}))):
            return
        for slot, sequence in enumerate(sequences):
            sequence.slot = slot
        runners = [executor.runners[g] for g in executor.by_runner(active)]
        slots, capacity = min(each.slots for each in runners), min(each.capacity for each in runners)
        counts = {device.shape(n, slots, 1, capacity)[0] for n in range(1, len(sequences) + 1)}
        bounds = {device.shape(1, slots, n, capacity)[1] for n in range(1, longest + 1)}
        for count, bound in ((n, b) for n in counts for b in bounds):
            for drafter, k, judged_too in plans:
                batch = Batch(sequences[:count], active, executor, steps.sampler.vocab_size, (count, text_width))
                for _ in range(device.launches_to_capture):
                    executor.launch(executor.main, "warm up", steps.graph.launch, batch, drafter, k, bound, judged_too)
        device.finish()
