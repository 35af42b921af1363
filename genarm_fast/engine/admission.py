"""Admission: which waiting sequence gets a slot, and what happens if the KV caches are too small for it."""

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
    """Gives slots to waiting sequences in the queue's order, and grows the caches for them.

    If memory runs out, fewer sequences run together. All slots are equally long, so one long request makes all of them
    long. While slots are in use, growing copies their contents, one tensor at a time. Without memory for that, the
    waiting sequences wait until others have left.
    """

    def __init__(self, executor: Executor, scheduler: Scheduler, workspace: Workspace) -> None:
        self.executor, self.scheduler, self.workspace = executor, scheduler, workspace
        self._attempted: Any = None  # the last growth that was tried; the same growth would fail again
        self._denied = False  # whether the last growth got fewer slots than were wanted
        self._logged_shortage: Any = None  # the shortage that was logged last
        self.reduced_batch_size: int | None = None  # most sequences that run together after a step ran out of memory
        self._generation = workspace.generation

    def admit(self, max_batch_size: int, cache_bytes: int | None) -> list[Sequence]:
        """Give slots to waiting sequences. Returns those that can never have a slot, with their `error` set."""
        scheduler, max_batch_size = self.scheduler, self.allowed_batch_size(max_batch_size)
        self._update_scheduler()
        failed = self._grow_for_needed_members(max_batch_size, cache_bytes)
        if scheduler.waiting and not scheduler.placed:
            # No slot is in use, so the caches can be made in one go for all sequences that wait.
            self._grow(max_batch_size, cache_bytes, scheduler.waiting)
        while len(scheduler.active) < max_batch_size:
            sequence = next((each for each in scheduler.waiting if not each.held), None)
            if sequence is None:
                break
            if cache_bytes is not None and self._bytes_alone(sequence) > cache_bytes:
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
                break  # wait until others have left
            else:
                longest = max(scheduler.waiting, key=lambda each: each.most_tokens)
                failed.append(self._refuse(longest, "out of memory", self.workspace.failure))
        return failed

    def _grow_for_needed_members(self, max_batch_size: int, cache_bytes: int | None) -> list[Sequence]:
        """Make caches for members that sequences need since their weights changed.

        Returns the sequences that could not get them, with their `error` set.
        """
        if self.workspace.holds(members_of(self.scheduler.placed), 0):
            return []
        lacking = [each for each in self.scheduler.placed if not self.workspace.holds(each.needed, 0)]
        if lacking:
            self._grow(max_batch_size, cache_bytes, [])
        without = [each for each in lacking if each.slot >= 0 and not self.workspace.holds(each.needed, 0)]
        return [self._refuse(each, "out of memory", self.workspace.failure) for each in without]

    def _fits(self, sequence: Sequence) -> bool:
        """Whether there is a free slot now, and slots are long enough for this sequence and all placed ones."""
        together = [*self.scheduler.placed, sequence]
        members = {*sequence.needed, *self._drafting_members(together)}
        return bool(self.scheduler.free_slots()) and self.workspace.holds(members, self._capacity(together))

    def _grow(self, max_batch_size: int, cache_bytes: int | None, queue: Iterable[Sequence]) -> None:
        """Grow the caches for all sequences that have a slot and, as far as memory allows, for those of a queue.

        Slots up to the highest one in use (`in_use`) keep their contents. The last growth that was tried
        (`_attempted`) is not repeated, since it would fail again.
        """
        scheduler, workspace = self.scheduler, self.workspace
        placed = scheduler.placed
        waiting = [each for each in queue if cache_bytes is None or self._bytes_alone(each) <= cache_bytes]
        new_slots = min(len(waiting), max_batch_size - len(scheduler.active))
        wanted = len(placed) + new_slots
        if cache_bytes is not None and self._slot_bytes(wanted, [*placed, *waiting]) > cache_bytes:
            # A long sequence makes all slots long, so fewer fit. Leave out first those that would get no slot anyway,
            # then as many from the end of the rest as the limit asks for.
            waiting = waiting[:new_slots]
            while len(waiting) > 1 and self._slot_bytes(len(placed) + len(waiting), [*placed, *waiting]) > cache_bytes:
                waiting.pop()
        together = [*placed, *waiting]
        if not together:
            return
        slots = len(placed) + min(new_slots, len(waiting))
        in_use = max((each.slot + 1 for each in placed if each.slot >= 0), default=0)
        if in_use:  # double the slots, so that sequences that come later cause few growths
            slots = max(slots, min(2 * workspace.slots, max_batch_size))
        members, capacity = self._members(together), self._capacity(together)
        # A long sequence may have left few, long slots. If none is in use, make more and shorter ones for those behind.
        fitting = cache_bytes is not None and self._slot_bytes(slots, together) <= cache_bytes
        remake = fitting and not in_use and slots > workspace.slots
        if self._denied and not remake and workspace.holds(members, capacity):
            return  # growing could only give more slots, and memory has denied them
        attempt = members, slots, capacity, in_use
        if attempt != self._attempted:
            self._attempted = attempt
            workspace.reserve(*attempt, cache_bytes)
            # A growth may have failed without memory for the old sizes either, or an interrupt may have ended it.
            if not workspace.is_intact:
                self._start_over()
                return self._grow(max_batch_size, cache_bytes, scheduler.waiting)
            self._denied = workspace.slots < max(slots, wanted)
            self._log_shortage(wanted, cache_bytes)
            self._update_scheduler()

    def _log_shortage(self, wanted: int, cache_bytes: int | None) -> None:
        """Log that fewer sequences run together than wanted: a warning, unless the user's limit asks for it."""
        found = min(self.workspace.slots, wanted), wanted, self.workspace.capacity
        if self._denied and found[0] < wanted and found != self._logged_shortage:
            level = logging.WARNING if cache_bytes is None else logging.INFO
            limit = "all that is free" if cache_bytes is None else f"cache_bytes={cache_bytes:,}"
            message = "KV caches of %s hold %d of %d sequences, of %d tokens each: the others wait"
            logger.log(level, message, limit, *found)
        self._logged_shortage = found

    def allowed_batch_size(self, max_batch_size: int) -> int:
        """Return how many sequences may run together: `max_batch_size`, or fewer after a step ran out of memory."""
        return max_batch_size if self.reduced_batch_size is None else min(max_batch_size, self.reduced_batch_size)

    def shrink(self, error: Exception) -> list[Sequence]:
        """Let half as many sequences run together after a step ran out of memory, in caches that are made anew.

        All sequences that have a slot wait first in the queue for a new one, and then go on where they are. Their text
        stays the same, since a step's draws do not depend on which sequences share it. Returns the sequences that the
        step has ended. Raises the error itself if it is of another kind, or if fewer sequences can't run.
        """
        placed = self.scheduler.placed
        most = max(1, len(placed) // 2)
        if not out_of_memory(error) or (self.reduced_batch_size is not None and most >= self.reduced_batch_size):
            raise error
        message = "a step of %d sequences ran out of memory: at most %d run together from now on (%s)"
        logger.warning(message, len(placed), most, error)
        self.reduced_batch_size = most
        self.executor.device.finish()  # work that still runs uses the caches that are freed next
        self._start_over()
        return [each for each in placed if each.ended]

    def _start_over(self) -> None:
        """Free caches whose contents are lost. Their sequences wait first in the queue for a new prefill."""
        for sequence in reversed(self.scheduler.placed):
            self.scheduler.preempt(sequence)
        self.workspace.free()
        self.begin()
        self._update_scheduler()

    def _update_scheduler(self) -> None:
        """Tell the scheduler how many slots there are, and to forget the prompts of caches that were dropped."""
        if self._generation != self.workspace.generation:
            self._generation = self.workspace.generation
            self.scheduler.forget_prompts()
        self.scheduler.resize(self.workspace.slots)

    def begin(self) -> None:
        """Allow growths to be tried again: as a run begins, there may be more memory or a higher limit."""
        self._attempted, self._denied = None, False

    def _capacity(self, sequences: list[Sequence]) -> int:
        """Return the tokens of a slot that each of these sequences fits into.

        A sequence near its end may be padded by as many positions as the drafts of another one take.
        """
        return max(each.most_tokens for each in sequences) + max(each.speculation.most for each in sequences)

    def _drafting_members(self, sequences: list[Sequence]) -> set[int]:
        draft_model = self.executor.draft_model
        drafts = any(each.speculation.most for each in sequences)
        return {draft_model} if draft_model is not None and drafts else set()

    def _members(self, sequences: list[Sequence]) -> set[int]:
        """Return the members that need caches for these sequences, the draft model included if one of them drafts."""
        return {m for each in sequences for m in each.needed} | self._drafting_members(sequences)

    def _slot_bytes(self, slots: int, sequences: list[Sequence]) -> int:
        """Return the bytes of this number of slots, each long enough for every one of these sequences."""
        if not sequences:
            return 0
        return slots * self._capacity(sequences) * self.workspace.token_bytes(self._members(sequences))

    def _bytes_alone(self, sequence: Sequence) -> int:
        return self._slot_bytes(1, [sequence])

    def _refuse(self, sequence: Sequence, why: str, cause: BaseException | None) -> Sequence:
        tokens, taken = self._capacity([sequence]), self._bytes_alone(sequence)
        sequence.error = MemoryError(f"{tokens} tokens take {taken:,} bytes of cache: {why}")
        sequence.error.__cause__ = cause
        self.scheduler.leave([sequence])
        self.begin()
        return sequence
