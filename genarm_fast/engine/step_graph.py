"""Steps as one launch, on devices that capture graphs: drafts, forwards of all runners, sampling and accepting.

For such a step the host copies inputs that changed, launches once, and reads the previous step. The step changes the
graph's own tensors, and the graph's next launch goes on from these. Steps that the host has to see are launched piece
by piece instead.
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

Shadows = tuple[tuple[int, ...], ...]  # members of each shadow: a drafter that is judged in a step without drafting


class StepKey(NamedTuple):
    """The fixed properties of a step's graph, from which all shapes follow. streams: the streams of its runners."""

    streams: tuple[WorkStream, ...]
    runners: tuple[Any, ...]  # KV bound and generation of the cache, for each runner
    active: tuple[int, ...]
    drafting: tuple[int, ...]  # members that draft
    k: int
    shadows: Shadows
    rows: int
    widths: tuple[int, int, int]  # number of stop ids, width of texts, tokens that have weights of their own
    parameters: tuple[str, ...]
    biased: bool
    logprobs: tuple[bool, int]
    plain_base: bool


class Report(NamedTuple):
    """The report of a step of q positions, which the host reads.

    numbers: int64 [R, 3 q + S], one tensor so that one copy is enough. Its columns are the q targets, their q statuses
    and the number of accepted targets; then the q - 1 drafts, all -1 for a row without drafts; then the first draft
    that each of S shadows would have made. logprobs: fields of `GuidedSample`, by name.
    """

    numbers: Tensor
    q: int
    logprobs: dict[str, Tensor]

    @staticmethod
    def pack(result: GuidedSample, counts: Tensor, drafts: Tensor, guesses: Sequence[Tensor]) -> Tensor:
        """Return `numbers`, with the int32 status cast to int64. guesses: the shadows' drafts, int64 [R, 1] each."""
        return torch.cat([result.tokens, result.status.to(torch.int64), counts[:, None], drafts, *guesses], dim=1)

    def unpack(
        self, read: Callable[[], Sequence[Tensor]], members: list[Member], active: tuple[int, ...]
    ) -> HostSample:
        """Return the tokens that the step drew. read: waits for `numbers` and the values of `logprobs`."""
        with span("read-back"):
            numbers, *logprobs = read()
        q, rows = self.q, numbers.tolist()
        return HostSample(
            [row[:q] for row in rows],
            [row[q : 2 * q] for row in rows],
            [row[2 * q] for row in rows],
            [drafts if (drafts := row[2 * q + 1 : 3 * q]) and drafts[0] >= 0 else [] for row in rows],
            dict(zip(self.logprobs, logprobs)),
            members,
            active,
        )

    def guesses(self, numbers: Tensor) -> Tensor:
        """Return the first draft that each shadow would have made, int64 [R, S], from `numbers` on the host."""
        return numbers[:, 3 * self.q :]


class StepGraph:
    """Launches whole steps, each as one graph."""

    def __init__(self, executor: Executor, sampler: Sampler) -> None:
        self.executor, self.sampler = executor, sampler

    def can_capture(self, members: tuple[int, ...]) -> bool:
        """Whether the device can run a step of these members as one launch."""
        runners = [self.executor.runners[g] for g in self.executor.by_runner(members)]
        streams = [self.executor.main, *(runner.stream for runner in runners)]
        return self.executor.device.captures(streams) and all(runner.on_one_device for runner in runners)

    def launch(
        self, batch: Batch, drafter: Drafter | None = None, k: int = 0, longest: int = 0, shadows: Shadows = ()
    ) -> Report:
        """Launch a step, and return its report. The next step overwrites the report, so begin to read it before that.

        drafter: drafts k tokens of every sequence from tensors on the device. longest: least KV bound of the graph.
        shadows: drafters to judge; all their members run in the step.
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
        if (k, width) not in batch.report_numbers:
            batch.report_numbers[k, width] = batch.state.lengths.new_empty(len(batch.rows), width)
        inputs.append(batch.report_numbers[k, width])
        logprobs = _logprobs(batch)

        def step(*tensors: Tensor) -> tuple[Tensor, ...]:
            given, numbers = iter(tensors[:-1]), tensors[-1]
            state = State(*islice(given, state_size))
            caches = {g: (bounds[g], next(given)) for g in groups}
            own_sampling = SamplingTensors(next(given), dict(zip(names, given)))
            own = batch.with_graph_tensors(state, own_sampling, next(given, None))
            with executor.capturing(caches):
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
        batch.state, batch.report_numbers[k, width] = State(*islice(out, state_size)), next(out)
        return Report(batch.report_numbers[k, width], k + 1, dict(zip(logprobs, out)))

    def _step(
        self, batch: Batch, drafter: Drafter | None, drafting: tuple[int, ...], k: int, shadows: Shadows
    ) -> tuple[Tensor, GuidedSample]:
        """Do a step's work on the main stream and on those of the runners, which fork from it and join it again.

        Returns `Report.numbers`, and the sample.
        """
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
    """Return the names of the fields of a `GuidedSample` that the batch asks for, besides tokens and status."""
    logprobs = ["logprobs", "member_logprobs"] if batch.wants_logprobs else []
    return [*logprobs, *(["top_tokens", "top_logprobs"] if batch.top_logprobs else [])]
