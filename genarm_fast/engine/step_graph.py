"""A whole step as one launch, on devices that capture: drafts, forwards of all runners on their streams, sampling,
accepting.

For such a step the host copies what changed, launches once, and reads the step before. What the step changes stays in
the graph's own tensors, from which its next launch goes on. Steps that the host has to see are launched piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genarm_fast.device.base import WorkStream, span
from genarm_fast.engine.batch import Batch
from genarm_fast.engine.executor import Executor
from genarm_fast.engine.sampler import HostSample, Sampler
from genarm_fast.engine.step_tensors import SamplingTensors, State
from genarm_fast.engine.verify import collect_logits, launch_verification
from genarm_fast.kernels import GuidedSample
from genarm_fast.models.member import Member
from genarm_fast.speculation.drafter import Drafter
from genarm_fast.speculation.model_drafter import tempered_draft

Shadows = tuple[tuple[int, ...], ...]  # members of each drafter that is judged in a step without drafting there


class StepKey(NamedTuple):
    """What a graph of a step holds for good; all shapes follow from it. streams: of the runners with the caches."""

    streams: tuple[WorkStream, ...]
    runners: tuple[Any, ...]  # of each: KV bound, generation of its cache
    active: tuple[int, ...]
    drafting: tuple[int, ...]  # members that draft
    k: int
    shadows: Shadows
    rows: int
    widths: tuple[int, int, int]  # stop ids, texts, tokens that have weights of their own
    parameters: tuple[str, ...]
    biased: bool
    logprobs: tuple[bool, int]
    plain_base: bool


class Report(NamedTuple):
    """What a step of q positions tells the host.

    numbers: int64 [R, 3 q + S], in one tensor so that one copy takes them: targets, their status, how many of them are
    accepted, the q - 1 drafts (all of them -1 where there are none), and what each of S shadows would have drafted
    first. logprobs: fields of `GuidedSample`, by name.
    """

    numbers: Tensor
    q: int
    logprobs: dict[str, Tensor]

    @staticmethod
    def pack(result: GuidedSample, counts: Tensor, drafts: Tensor, guesses: Sequence[Tensor]) -> Tensor:
        """`numbers`; the status, int32, is cast. guesses: int64 [R, 1] each."""
        return torch.cat([result.tokens, result.status.to(torch.int64), counts[:, None], drafts, *guesses], dim=1)

    def unpack(
        self, read: Callable[[], Sequence[Tensor]], members: list[Member], active: tuple[int, ...]
    ) -> HostSample:
        """What a step of these members drew. read: waits for `numbers` and the values of `logprobs`."""
        with span("read-back"):
            numbers, *logprobs = read()
        q, rows = self.q, numbers.tolist()
        return HostSample(
            [row[:q] for row in rows],
            [row[q : 2 * q] for row in rows],
            [row[2 * q] for row in rows],
            [drafts if (drafts := row[2 * q + 1 : 3 * q]) and drafts[0] >= 0 else [] for row in rows],  # -1: none
            dict(zip(self.logprobs, logprobs)),
            members,
            active,
        )

    def guesses(self, numbers: Tensor) -> Tensor:
        """What each shadow would have drafted first, of `numbers` on the host, int64 [R, S]."""
        return numbers[:, 3 * self.q :]


class StepGraph:
    """Steps of one batch after another, each as one launch."""

    def __init__(self, executor: Executor, sampler: Sampler) -> None:
        self.executor, self.sampler = executor, sampler

    def serves(self, members: tuple[int, ...]) -> bool:
        """Whether the device can have steps in which these members run as one launch."""
        runners = [self.executor.runners[g] for g in self.executor.by_runner(members)]
        streams = [self.executor.main, *(runner.stream for runner in runners)]
        return self.executor.device.captures(streams) and all(runner.on_one_device for runner in runners)

    def launch(
        self, batch: Batch, drafter: Drafter | None = None, k: int = 0, longest: int = 0, shadows: Shadows = ()
    ) -> Report:
        """Launch a step; its report is the next step's as well, so it has to be read before that is launched.

        drafter: drafts k tokens of every sequence, by what the device knows. longest: a KV bound to have at least.
        shadows: of members that run.
        """
        executor, main, device = self.executor, self.executor.main, self.executor.device
        drafting = drafter.members if drafter is not None and k else ()
        groups = executor.by_runner(sorted({*batch.active, *drafting}))
        runners = {g: executor.runners[g] for g in groups}
        bounds = {
            g: device.shape(1, each.slots, max(batch.kv_bound(groups[g], k + 1), longest), each.capacity)[1]
            for g, each in runners.items()
        }
        sampling, bias = batch.sampling(main), batch.bias()
        names, state_size = tuple(sampling.parameters), len(State._fields)
        inputs = [*batch.state, *(batch.cache_rows(g, members) for g, members in groups.items()), sampling.weights]
        inputs += [*sampling.parameters.values(), *([] if bias is None else [bias])]
        width = 3 * (k + 1) + len(shadows)
        if (k, width) not in batch.numbers:
            batch.numbers[k, width] = batch.state.lengths.new_empty(len(batch.rows), width)
        inputs.append(batch.numbers[k, width])
        logprobs = _logprobs(batch)

        def step(*tensors: Tensor) -> tuple[Tensor, ...]:
            given, numbers = iter(tensors[:-1]), tensors[-1]
            state = State(*islice(given, state_size))
            caches = {g: (bounds[g], next(given)) for g in groups}
            own = batch.over(state, SamplingTensors(next(given), dict(zip(names, given))), next(given, None))
            with executor.captured(caches):
                numbers_now, result = self._step(own, drafter, drafting, k, shadows)
            numbers.copy_(numbers_now)
            for old, new in zip(state, own.state):
                if old is not new:
                    old.copy_(new)
            return (*state, numbers, *(getattr(result, name) for name in logprobs))

        streams = tuple(runner.stream for runner in runners.values())
        key = StepKey(
            streams,
            tuple((bounds[g], runner.generation) for g, runner in runners.items()),
            batch.active,
            drafting,
            k,
            shadows,
            len(batch.rows),
            (batch.state.stop_ids.shape[1], batch.state.texts.shape[1], sampling.weights.shape[1]),
            names,
            bias is not None,
            (batch.wants_logprobs, batch.top_logprobs),
            batch.plain_base,
        )
        out = iter(executor.repeat(key, streams, step, *inputs))
        batch.state, batch.numbers[k, width] = State(*islice(out, state_size)), next(out)
        return Report(batch.numbers[k, width], k + 1, dict(zip(logprobs, out)))

    def _step(
        self, batch: Batch, drafter: Drafter | None, drafting: tuple[int, ...], k: int, shadows: Shadows
    ) -> tuple[Tensor, GuidedSample]:
        """The work of a step, on the main stream and on those of the runners, which leave it and come back; the numbers
        that it reports, and what it drew."""
        executor = self.executor
        if drafter is not None and k:
            with span("draft"):
                drafts = drafter.capture(batch, k)
            launched = launch_verification(executor, batch, drafting, drafts.block, drafts.stream)
            block, logits = drafts.rest()  # the drafter's last forward runs beside the verification
        else:
            block, logits = batch.state.stop_ids[:, :0], {}
            launched = launch_verification(executor, batch, drafting, block, executor.main)
        logits |= collect_logits(executor, launched)
        with span("sample"):
            result = self.sampler.draw([logits[m] for m in batch.active], batch)
            first = batch.response_positions(1)
            guesses = [
                tempered_draft(batch, [logits[m][:, :1] for m in members], members, first, executor.main)
                for members in shadows
            ]
        with span("accept"):
            settled = batch.accept(result.tokens, block)
        return Report.pack(result, settled.counts, block, guesses), result


def _logprobs(batch: Batch) -> list[str]:
    """Fields of a `GuidedSample` that such a batch asks for, beside tokens and status."""
    logprobs = ["logprobs", "member_logprobs"] if batch.wants_logprobs else []
    return [*logprobs, *(["top_tokens", "top_logprobs"] if batch.top_logprobs else [])]
