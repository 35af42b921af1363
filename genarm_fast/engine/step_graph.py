"""A whole step as one launch, on devices that capture: forwards of all runners on their streams, sampling, accepting.

For such a step the host copies what changed, launches once, and reads the step before. What the step changes stays in
the graph's own tensors, from which its next launch goes on. Steps that the host has to see, or of which the tuner wants
to know more, are launched piece by piece.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from genarm_fast.device.base import WorkStream, span
from genarm_fast.engine.batch import Batch, SamplingTensors, State
from genarm_fast.engine.executor import Executor
from genarm_fast.engine.sampler import Sampler
from genarm_fast.kernels import GuidedSample


class StepKey(NamedTuple):
    """What a graph of a step holds for good. streams: of the runners, whose caches it uses."""

    streams: tuple[WorkStream, ...]
    runners: tuple[Any, ...]  # of each: KV bound, generation of its cache
    active: tuple[int, ...]
    shapes: tuple[Any, ...]
    parameters: tuple[str, ...]
    biased: bool
    logprobs: tuple[bool, int]
    plain_base: bool


class StepGraph:
    """Plain steps of one batch after another, each as one launch."""

    def __init__(self, executor: Executor, sampler: Sampler) -> None:
        self.executor, self.sampler = executor, sampler

    def serves(self, active: tuple[int, ...]) -> bool:
        """Whether the device can have steps of these members as one launch."""
        runners = [self.executor.runners[g] for g in self.executor.by_runner(active)]
        streams = [self.executor.main, *(runner.stream for runner in runners)]
        return self.executor.device.captures(streams) and all(runner.on_one_device for runner in runners)

    def launch(self, batch: Batch, longest: int = 0) -> tuple[GuidedSample, Tensor]:
        """The next targets [R, 1], and how many of them each sequence accepts, int64 [R].

        longest: a KV bound to have at least.
        """
        executor, main = self.executor, self.executor.main
        groups = executor.by_runner(batch.active)
        runners = [executor.runners[g] for g in groups]
        bounds = [
            executor.device.shape(1, runner.slots, max(batch.kv_bound(members, 1), longest), runner.capacity)[1]
            for runner, members in zip(runners, groups.values())
        ]
        sampling, bias = batch.sampling(main), batch.bias()
        rows = [batch.cache_rows(g, members) for g, members in groups.items()]
        names = tuple(sampling.parameters)
        inputs = [*batch.state, *rows, sampling.weights, *sampling.parameters.values()]
        inputs += [] if bias is None else [bias]

        def step(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            own = State(*islice(given, len(State._fields)))
            own_rows = list(islice(given, len(rows)))
            own_sampling = SamplingTensors(next(given), dict(zip(names, given)))
            logits = self._forward(groups, bounds, own_rows, own)
            ordered = [logits[m] for m in batch.active]
            with span("sample"):
                result = self.sampler.draw(ordered, batch, own_sampling, own, None if bias is None else tensors[-1])
            with span("accept"):
                after, settled = own.accept(result.tokens, result.tokens[:, :0])
            for old, new in zip(own, after):
                if old is not new:
                    old.copy_(new)
            return (*own, settled.counts, *(getattr(result, name) for name in _names(batch)))

        key = StepKey(
            tuple(runner.stream for runner in runners),
            tuple((bound, runner.generation) for bound, runner in zip(bounds, runners)),
            batch.active,
            tuple(tensor.shape for tensor in inputs),
            names,
            bias is not None,
            (batch.wants_logprobs, batch.top_logprobs),
            batch.plain_base,
        )
        out = executor.device.repeat(main, key, step, *inputs)
        found = iter(out)
        batch.state, counts = State(*islice(found, len(State._fields))), next(found)
        return GuidedSample(**dict(zip(_names(batch), found))), counts

    def _forward(
        self, groups: dict[int, list[int]], bounds: list[int], rows: list[Tensor], state: State
    ) -> dict[int, Tensor]:
        """Logits [R, 1, V] of each member on the main stream; the runners' streams leave it and come back."""
        executor, launched = self.executor, []
        for (g, members), bound, own in zip(groups.items(), bounds, rows):
            runner, lanes = executor.runners[g], executor.lanes(members)
            inputs = executor.hand_over(
                [state.tokens(members), state.positions(members), own], executor.main, runner.stream
            )
            logits = executor.launch(runner.stream, executor.label(members), runner.logits, bound, lanes, *inputs)
            launched.append((members, list(logits)))
        return {m: each for members, lanes in launched for m, each in executor.collect(members, lanes).items()}


def _names(batch: Batch) -> list[str]:
    """Fields of a `GuidedSample` that such a batch asks for."""
    logprobs = ["logprobs", "member_logprobs"] if batch.wants_logprobs else []
    return ["tokens", "status", *logprobs, *(["top_tokens", "top_logprobs"] if batch.top_logprobs else [])]
