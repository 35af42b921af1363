"""Memory that lives from run to run: the KV caches of all runners, grown when longer or more requests come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from itertools import chain

import torch

from genarm_fast.device.base import out_of_memory
from genarm_fast.engine.allocate import sizes
from genarm_fast.engine.executor import Executor
from genarm_fast.engine.selfcheck import entries_of, token_bytes

LEAST = 1 << 26  # bytes of caches that are kept, where the weights take less


class Workspace:
    """The KV caches of an executor's runners: `slots` slots for sequences, each with `capacity` tokens a member."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.slots = self.capacity = 0
        self.generation = 0  # counts how often everything in the caches was dropped
        self.failure: BaseException | None = None  # why the last growth fell short
        self.warm: float = 0  # bytes that are kept in any case, since `warm_up` made them

    def holds(self, members: Iterable[int], capacity: int) -> bool:
        """Whether these members' caches are there, with so many tokens a slot."""
        groups = self.executor.by_runner(members)
        lanes = all(set(self.executor.lanes(own)) <= set(self.executor.runners[g].blocks) for g, own in groups.items())
        return lanes and self.capacity >= capacity

    def token_bytes(self, members: Iterable[int]) -> int:
        """What the caches of these members take for one token."""
        groups = self.executor.by_runner(members).items()
        hosts = [(self.executor.runners[g].members, len(own)) for g, own in groups]
        return sum(token_bytes(host) // len(host) * count for host, count in hosts)

    def reserve(self, members: set[int], slots: int, capacity: int, in_use: int, cache_bytes: int | None) -> None:
        """Have so many slots with so many tokens for these members, or as many as memory allows.

        That is as many as fit beside what the device keeps for forwards; if that is not one, what fits at all.

        in_use: slots, counted from 0, whose sequences must stay. With none in use, too small caches are freed before
        larger ones are made; else they grow tensor by tensor. Afterwards `slots` and `capacity` say what there is, or
        `whole` is False.
        """
        held = {m for m in range(len(self.executor.members)) if self.slots and self.holds([m], 0)}
        if self.slots >= slots and self.holds(members, capacity) and self.allowed(cache_bytes):
            return
        if in_use:
            members = members | held
            slots, capacity = max(slots, self.slots), max(capacity, self.capacity)
        else:
            self.free()
        token, least = self.token_bytes(members), max(in_use, 1)
        groups = self.executor.by_runner(sorted(members))
        rooms = self._rooms(groups, growing=in_use > 0)

        def allowed(slots: int, tokens: int) -> bool:
            return cache_bytes is None or slots * tokens * token <= cache_bytes

        def fits(slots: int, tokens: int) -> bool:
            return allowed(slots, tokens) and all(slots * tokens * each <= room for each, room in rooms)

        last = [(least, capacity)] if allowed(least, capacity) else []
        for count, tokens in chain(sizes(slots, least, capacity, fits), last):
            if self._grow(groups, count, tokens):
                self.slots, self.capacity = count, tokens
                return
            if not in_use:
                self.free()
            elif not self.whole:
                return

    @property
    def whole(self) -> bool:
        """False where a growth ended half-way: nothing in the caches counts any more, and they have to be freed."""
        return all(runner.whole for runner in self.executor.runners)

    def _rooms(self, groups: dict[int, list[int]], growing: bool) -> list[tuple[int, float]]:
        """For each device: bytes that its caches take for one token, and bytes that they may take.

        Those of caches that are there count as free. Growing takes one tensor above the new size, at most a layer.
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
        """Have so much for these members by runner; whether there was memory."""
        try:
            for g, own in groups.items():
                runner = self.executor.runners[g]
                inputs = (entries_of(runner.members), self.executor.lanes(own), slots, tokens)
                self.executor.launch(runner.stream, "allocate", runner.reserve, *inputs)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self.failure = error.with_traceback(None)  # its frames hold caches
            return False
        return True

    @property
    def bytes(self) -> int:
        return sum(runner.bytes for runner in self.executor.runners)

    def allowed(self, cache_bytes: int | None) -> bool:
        """Whether the caches take no more than this."""
        return cache_bytes is None or self.bytes <= cache_bytes

    def trim(self) -> None:
        """A run has ended: keep the caches for the next one, unless they take more than the weights."""
        if self.bytes > max(self.most, self.warm):
            self.free()

    def free(self) -> None:
        """Let go of all caches."""
        for runner in self.executor.runners:
            runner.free()
        self.slots = self.capacity = 0
        self.generation += 1

    @cached_property
    def most(self) -> int:
        """Bytes of caches that are kept while nothing runs."""
        models = (member.model for member in self.executor.members)
        weights = {p.data_ptr(): p.nbytes for model in models for p in model.parameters()}
        return max(sum(weights.values()), LEAST)
