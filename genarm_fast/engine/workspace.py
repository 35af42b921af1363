"""The workspace: KV caches of all runners, which live from run to run and grow when longer or more requests come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from itertools import chain

import torch

from genarm_fast.device.base import out_of_memory
from genarm_fast.engine.allocate import sizes_to_try
from genarm_fast.engine.executor import Executor
from genarm_fast.engine.selfcheck import entries_of, token_bytes

MIN_KEPT_BYTES = 1 << 26  # bytes of caches that may be kept if the weights take fewer


class Workspace:
    """The KV caches of an executor's runners: `slots` slots for sequences, each with `capacity` tokens per member."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.slots = self.capacity = 0
        self.generation = 0  # number of times that all caches were freed
        self.failure: BaseException | None = None  # error of the last growth that ran out of memory
        self.warm_up_bytes: float = 0  # bytes that are kept after a run in any case, since `warm_up` made them

    def holds(self, members: Iterable[int], capacity: int) -> bool:
        """Whether these members have caches, with at least `capacity` tokens per slot."""
        groups = self.executor.by_runner(members)
        lanes = all(set(self.executor.lanes(own)) <= set(self.executor.runners[g].blocks) for g, own in groups.items())
        return lanes and self.capacity >= capacity

    def token_bytes(self, members: Iterable[int]) -> int:
        """Return the bytes that the caches of these members take for one token."""
        groups = self.executor.by_runner(members).items()
        hosts = [(self.executor.runners[g].members, len(own)) for g, own in groups]
        return sum(token_bytes(host) // len(host) * count for host, count in hosts)

    def reserve(self, members: set[int], slots: int, capacity: int, in_use: int, cache_bytes: int | None) -> None:
        """Make `slots` slots of `capacity` tokens for these members, or as many slots as memory allows.

        First it tries as many as fit beside the memory that the device keeps free for forwards. If that fails, it tries
        one slot, or the slots in use, in all memory that is left.

        in_use: number of the first slots whose contents must stay. With none in use, caches that are too small are
        freed before larger ones are made; else they grow tensor by tensor. Afterwards `slots` and `capacity` tell what
        there is, or `is_intact` is False.
        """
        held = {m for m in range(len(self.executor.members)) if self.slots and self.holds([m], 0)}
        if self.slots >= slots and self.holds(members, capacity) and self.is_within_limit(cache_bytes):
            return
        if in_use:
            members = members | held
            slots, capacity = max(slots, self.slots), max(capacity, self.capacity)
        else:
            self.free()
        token, least = self.token_bytes(members), max(in_use, 1)
        groups = self.executor.by_runner(sorted(members))
        budgets = self._device_budgets(groups, growing=in_use > 0)

        def allowed(slots: int, tokens: int) -> bool:
            return cache_bytes is None or slots * tokens * token <= cache_bytes

        def fits(slots: int, tokens: int) -> bool:
            return allowed(slots, tokens) and all(slots * tokens * each <= budget for each, budget in budgets)

        last = [(least, capacity)] if allowed(least, capacity) else []
        for count, tokens in chain(sizes_to_try(slots, least, capacity, fits), last):
            if self._grow(groups, count, tokens):
                self.slots, self.capacity = count, tokens
                return
            if not in_use:
                self.free()
            elif not self.is_intact:
                return

    @property
    def is_intact(self) -> bool:
        """False if a growth ended half-way: then the caches' contents are lost, and the caches have to be freed."""
        return all(runner.is_intact for runner in self.executor.runners)

    def _device_budgets(self, groups: dict[int, list[int]], growing: bool) -> list[tuple[int, float]]:
        """Return for each device the bytes that its caches take for one token, and the bytes that they may take.

        Memory of the present caches counts as free. Growing takes one tensor more than the new size, for which a
        layer's bytes are counted.
        """
        taken: Counter[torch.device] = Counter()
        copied: Counter[torch.device] = Counter()
        held: Counter[torch.device] = Counter()
        for g, members in groups.items():
            device, token = self.executor.members[members[0]].device, self.token_bytes(members)
            taken[device] += token
            held[device] += self.executor.runners[g].bytes
            copied[device] = max(copied[device], -(-token // len(self.executor.runners[g].layers)))
        return [
            (each + growing * copied[device], self.executor.device.spare_bytes(device) + held[device])
            for device, each in taken.items()
        ]

    def _grow(self, groups: dict[int, list[int]], slots: int, tokens: int) -> bool:
        """Grow the caches of these members, grouped by runner, to this size. Returns whether there was memory."""
        try:
            for g, own in groups.items():
                runner = self.executor.runners[g]
                inputs = (entries_of(runner.members), self.executor.lanes(own), slots, tokens)
                self.executor.launch(runner.stream, "allocate", runner.reserve, *inputs)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self.failure = error.with_traceback(None)  # the traceback's frames would keep caches alive
            return False
        return True

    @property
    def bytes(self) -> int:
        return sum(runner.bytes for runner in self.executor.runners)

    def is_within_limit(self, cache_bytes: int | None) -> bool:
        """Whether the caches take at most `cache_bytes`; None allows any size."""
        return cache_bytes is None or self.bytes <= cache_bytes

    def trim(self) -> None:
        """End a run: keep the caches for the next one, unless they take more bytes than may be kept."""
        if self.bytes > max(self.kept_bytes_limit, self.warm_up_bytes):
            self.free()

    def free(self) -> None:
        """Free all caches."""
        for runner in self.executor.runners:
            runner.free()
        self.slots = self.capacity = 0
        self.generation += 1

    @cached_property
    def kept_bytes_limit(self) -> int:
        """Most bytes of caches that are kept while nothing runs: those of the weights, and at least LEAST."""
        models = (member.model for member in self.executor.members)
        weights = {p.data_ptr(): p.nbytes for model in models for p in model.parameters()}
        return max(sum(weights.values()), MIN_KEPT_BYTES)
