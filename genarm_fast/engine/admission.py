"""Which waiting sequence gets a slot, and what happens where the KV caches are too small for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from genarm_fast.device.base import out_of_memory
from genarm_fast.engine.executor import Executor
from genarm_fast.engine.scheduler import Scheduler
from genarm_fast.engine.sequence import Sequence, members_of
from genarm_fast.engine.workspace import Workspace

logger = logging.getLogger(__name__)


class Admission:
    """Fills slots from the queue in order. Caches grow with what waits; out of memory, fewer sequences run together.

    All slots are equally long, so one long request makes all of them long. Where slots are in use, growing copies what
    they hold, a tensor at a time; without memory for that, what waits has to wait until others have left.
    """

    def __init__(self, executor: Executor, scheduler: Scheduler, workspace: Workspace) -> None:
        self.executor, self.scheduler, self.workspace = executor, scheduler, workspace
        self._attempted: Any = None  # the last growth that was tried: the same one again would fail again
        self._denied = False  # memory gave fewer slots than were wanted
        self._said: Any = None  # the shortage that was logged last
        self.most: int | None = None  # sequences that run together since a step ran out of memory
        self._generation = workspace.generation

    def admit(self, max_batch_size: int, cache_bytes: int | None) -> list[Sequence]:
        """Give slots to waiting sequences; returns those that can never have one, with their `error` set."""
        scheduler, max_batch_size = self.scheduler, self.at_most(max_batch_size)
        self._follow()
        failed = self._keep_up(max_batch_size, cache_bytes)
        if scheduler.waiting and not scheduler.placed:
            # At once for all that wait, since nothing has to stay.
            self._grow(max_batch_size, cache_bytes, scheduler.waiting)
        while len(scheduler.active) < max_batch_size:
            sequence = next((each for each in scheduler.waiting if not each.held), None)
            if sequence is None:
                break
            if cache_bytes is not None and self._bytes(sequence) > cache_bytes:
                limit = f"expected at most cache_bytes={cache_bytes:,}"
                failed.append(self._refuse(sequence, limit, None))
                continue
            if not self._fits(sequence):
                self._grow(max_batch_size, cache_bytes, scheduler.waiting)
            if self._fits(sequence):
                scheduler.place(sequence, len(self.executor.members))
            elif held := [each for each in scheduler.placed if each.held]:
                scheduler.preempt(held[-1])
            elif scheduler.placed:
                break  # until others have left
            else:
                longest = max(scheduler.waiting, key=lambda each: each.most_tokens)
                failed.append(self._refuse(longest, "out of memory", self.workspace.failure))
        return failed

    def _keep_up(self, max_batch_size: int, cache_bytes: int | None) -> list[Sequence]:
        """Make caches for members that sequences came to need when their weights changed."""
        if self.workspace.holds(members_of(self.scheduler.placed), 0):
            return []
        lacking = [each for each in self.scheduler.placed if not self.workspace.holds(each.needed, 0)]
        if lacking:
            self._grow(max_batch_size, cache_bytes, [])
        without = [each for each in lacking if each.slot >= 0 and not self.workspace.holds(each.needed, 0)]
        return [self._refuse(each, "out of memory", self.workspace.failure) for each in without]

    def _fits(self, sequence: Sequence) -> bool:
        """Whether there is a free slot now, long enough for every sequence with the drafts of all."""
        together = [*self.scheduler.placed, sequence]
        members = {*sequence.needed, *self._drafting(together)}
        return bool(self.scheduler.free_slots()) and self.workspace.holds(members, self._capacity(together))

    def _grow(self, max_batch_size: int, cache_bytes: int | None, queue: Iterable[Sequence]) -> None:
        """Have caches for all that have a slot and, as far as memory goes, for those of a queue.

        Slots up to the highest one in use (`in_use`) keep what they hold. An attempt that was made before
        (`_attempted`) is not repeated: it would fail again.
        """
        scheduler, workspace = self.scheduler, self.workspace
        placed = scheduler.placed
        waiting = [each for each in queue if cache_bytes is None or self._bytes(each) <= cache_bytes]
        places = min(len(waiting), max_batch_size - len(scheduler.active))
        wanted = len(placed) + places
        if cache_bytes is not None and self._cost(wanted, [*placed, *waiting]) > cache_bytes:
            waiting = waiting[:places]  # a long one far back would take slots from the short ones before it
            while len(waiting) > 1 and self._cost(len(placed) + len(waiting), [*placed, *waiting]) > cache_bytes:
                waiting.pop()  # so would a long one near the front
        together = [*placed, *waiting]
        if not together:
            return
        slots = len(placed) + min(places, len(waiting))
        in_use = max((each.slot + 1 for each in placed if each.slot >= 0), default=0)
        if in_use:  # those who come later pay for few growths
            slots = max(slots, min(2 * workspace.slots, max_batch_size))
        members, capacity = self._members(together), self._capacity(together)
        # Where nothing has to stay, slots that a long one made few are made anew for the short ones behind it.
        fitting = cache_bytes is not None and self._cost(slots, together) <= cache_bytes
        anew = fitting and not in_use and slots > workspace.slots
        if self._denied and not anew and workspace.holds(members, capacity):
            return  # more slots are all that growing could give
        attempt = members, slots, capacity, in_use
        if attempt != self._attempted:
            self._attempted = attempt
            workspace.reserve(*attempt, cache_bytes)
            if not workspace.whole:  # no memory to go back, or an interrupt in an earlier growth
                self._start_over()
                return self._grow(max_batch_size, cache_bytes, scheduler.waiting)
            self._denied = workspace.slots < max(slots, wanted)
            self._say(wanted, cache_bytes)
            self._follow()

    def _say(self, wanted: int, cache_bytes: int | None) -> None:
        """Log that fewer sequences run together than might: a warning where no limit of the user's asks for it."""
        found = min(self.workspace.slots, wanted), wanted, self.workspace.capacity
        if self._denied and found[0] < wanted and found != self._said:
            level = logging.WARNING if cache_bytes is None else logging.INFO
            limit = "all that is free" if cache_bytes is None else f"cache_bytes={cache_bytes:,}"
            said = "KV caches of %s hold %d of %d sequences, of %d tokens each: the others wait"
            logger.log(level, said, limit, *found)
        self._said = found

    def at_most(self, max_batch_size: int) -> int:
        """Sequences that may run together."""
        return max_batch_size if self.most is None else min(max_batch_size, self.most)

    def shrink(self, error: Exception) -> list[Sequence]:
        """A step ran out of memory: from now on half as many sequences run together, in caches that are made anew.

        All that have a slot wait for it again, first in the queue, and go on where they are: what a step draws does not
        depend on who else is in it. Returns those that the step has ended. Raises the error itself if it is of another
        kind, or if no fewer can run.
        """
        placed = self.scheduler.placed
        most = max(1, len(placed) // 2)
        if not out_of_memory(error) or (self.most is not None and most >= self.most):
            raise error
        said = "a step of %d sequences ran out of memory: at most %d run together from now on (%s)"
        logger.warning(said, len(placed), most, error)
        self.most = most
        self.executor.device.finish()  # what is still running uses caches that are about to be freed
        self._start_over()
        return [each for each in placed if each.ended]

    def _start_over(self) -> None:
        """Free caches that lost what they held; whose slots are in them wait, first in the queue, for a new prefill."""
        for sequence in reversed(self.scheduler.placed):
            self.scheduler.preempt(sequence)
        self.workspace.free()
        self.begin()
        self._follow()

    def _follow(self) -> None:
        """Let the scheduler have the slots that the caches have, and nothing of what was dropped with older caches."""
        if self._generation != self.workspace.generation:
            self._generation = self.workspace.generation
            self.scheduler.forget_prompts()
        self.scheduler.resize(self.workspace.slots)

    def begin(self) -> None:
        """A run begins: there may be more memory than before, or a higher limit."""
        self._attempted, self._denied = None, False

    def _capacity(self, sequences: list[Sequence]) -> int:
        """Tokens of a slot for these sequences; near its end, one may be padded as far as the others' drafts go."""
        return max(each.most_tokens for each in sequences) + max(each.speculation.most for each in sequences)

    def _drafting(self, sequences: list[Sequence]) -> set[int]:
        draft_model = self.executor.draft_model
        drafts = any(each.speculation.most for each in sequences)
        return {draft_model} if draft_model is not None and drafts else set()

    def _members(self, sequences: list[Sequence]) -> set[int]:
        """Members that need caches for these sequences, a draft model too."""
        return {m for each in sequences for m in each.needed} | self._drafting(sequences)

    def _cost(self, slots: int, sequences: list[Sequence]) -> int:
        """Bytes of so many slots, each long enough for every one of these sequences."""
        if not sequences:
            return 0
        return slots * self._capacity(sequences) * self.workspace.token_bytes(self._members(sequences))

    def _bytes(self, sequence: Sequence) -> int:
        return self._cost(1, [sequence])

    def _refuse(self, sequence: Sequence, why: str, cause: BaseException | None) -> Sequence:
        tokens, taken = self._capacity([sequence]), self._bytes(sequence)
        sequence.error = MemoryError(f"{tokens} tokens take {taken:,} bytes of cache: {why}")
        sequence.error.__cause__ = cause
        self.scheduler.leave([sequence])
        self.begin()
        return sequence
