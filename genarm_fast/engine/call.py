"""Calls of event loops: the sequences that a task waits for while the engine's thread steps.

A task's wishes go through the thread's inbox. All items of a step go back to each loop in one callback. So neither the
task nor the thread holds a lock that the other one waits for.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from genarm_fast.engine.engine import Engine
from genarm_fast.engine.sequence import Sequence
from genarm_fast.params import Weight

Job = Callable[[Any], None]  # a function that the thread calls with its `_CallWorker`
END = object()  # marker that follows the last item of a call


class Call:
    """Sequences that a task waits for. `EngineThread.call` makes it in the task's event loop.

    collect: returns the item of a sequence that a step advanced, or None; called in the thread that steps, at the end
    of the step. ahead: how many items of each sequence may be made before the task asks for them; None: any number.

    `asked` and `made` count items. `next` raises `asked` and then reads `stalled`; `news` raises `made`, sets `stalled`
    and then reads `asked`. In any order of these, one of the two sees that the call may go on.
    """

    def __init__(
        self,
        inbox: SimpleQueue[Job | None],
        engine: Engine,
        sequences: list[Sequence],
        collect: Callable[[Sequence], Any],
        ahead: int | None = None,
    ) -> None:
        self.engine, self.sequences, self.collect = engine, sequences, collect
        self.ahead = None if ahead is None else ahead * len(sequences)
        self.loop = asyncio.get_running_loop()
        self.inbox = inbox
        self.asked = self.made = 0
        self.stalled = ahead is not None
        self.items: deque[Any] = deque()
        self.over = self.closed = False
        self.failure: BaseException | None = None
        self._waiters: list[asyncio.Future[None]] = []
        # Sequences that have not ended, as far as the engine's thread knows. Only that thread touches them.
        self.open = {sequence.id: sequence for sequence in sequences}

    # Methods for the event loop:

    async def next(self) -> Any:
        """Return the next item. If the task is cancelled, the call is closed.

        Raises:
            StopAsyncIteration: no item is left.
            RuntimeError: another task waits for an item, or the call belongs to another event loop.
        """
        if self._waiters:
            raise RuntimeError("another task waits for the next chunk: expected one reader")
        if asyncio.get_running_loop() is not self.loop:
            raise RuntimeError("expected the event loop in which it began")
        self.asked += 1
        if self.stalled:
            self.inbox.put(lambda worker: worker.resume(self))
        try:
            while not self.items and not self.over:
                await self._changed()
        except BaseException:
            self.close()
            raise
        if self.items:
            return self.items.popleft()
        if self.failure is not None:
            raise self.failure
        raise StopAsyncIteration

    def close(self) -> None:
        """Have the thread take unfinished sequences out, after a step that runs. Returns at once; for any thread."""
        if not (self.closed or self.over):
            self.closed = True
            self.inbox.put(lambda worker: worker.close(self))

    async def closing(self) -> None:
        """Close the call, and wait until its sequences have left the engine.

        Raises RuntimeError in another event loop: the call is closed then, but can't be waited for.
        """
        self.close()
        if not self.over and asyncio.get_running_loop() is not self.loop:
            raise RuntimeError("closed, but its end can be waited for in the event loop in which it began alone")
        while not self.over:
            await self._changed()

    def drop(self, sequence: Sequence) -> None:
        """Have the thread take one unfinished sequence out, while the others go on."""
        self.inbox.put(lambda worker: worker.drop(self, sequence))

    def steer(self, sequence: Sequence, weights: tuple[Weight, ...]) -> None:
        """Have the thread draw a sequence's next token with other weights, before any later wish is done."""
        self.inbox.put(lambda _: self.engine.steer(sequence, weights))

    async def _changed(self) -> None:
        """Wait until `receive` is called."""
        waiter = self.loop.create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            self._waiters.remove(waiter)

    def receive(self, item: Any) -> None:
        """Add an item, or note the end, and wake the task."""
        if item is END:
            self.over = True
        else:
            self.items.append(item)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    # Methods for the thread that steps:

    def news(self, sequence: Sequence) -> None:
        """Make the item of a sequence that a step advanced, and let the sequence go on if its reader wants more."""
        item = self.collect(sequence)
        self.made += item is not None
        if self.ahead is not None:
            self.stalled = True
            if self.wants_more():
                self.stalled = sequence.held = False
        ended = sequence.ended
        self.inbox.put(lambda worker: worker.take(self, sequence, item, ended))

    def wants_more(self) -> bool:
        """Whether fewer items are made than the reader has asked for, plus those that may be made ahead."""
        return self.ahead is None or self.asked + self.ahead > self.made

    # Methods for the engine's thread:

    def can_advance(self) -> bool:
        """Whether a step would advance one of its sequences, or end a held one whose time is over."""
        found, cancelled, now = False, [], time.perf_counter()
        for sequence in self.open.values():
            found = not sequence.ended and (not sequence.held or sequence.is_late(now))
            if found:
                break
            if sequence.finish_reason == "cancelled":  # `abort` took it out, and does not call `news`
                cancelled.append(sequence.id)
        for key in cancelled:
            del self.open[key]
        return found

    def deadline(self) -> float:
        """Return the earliest deadline of sequences that have not ended, in seconds of `perf_counter`; inf for none."""
        times = (each.deadline for each in self.open.values() if not each.ended and each.deadline is not None)
        return min(times, default=math.inf)


def receive(items: list[tuple[Call, Any]], answer: Callable[[], None] | None) -> None:
    """Give each call its items; runs in the event loop. `answer` is called after the tasks that wait have run."""
    for call, item in items:
        call.receive(item)
    if answer is not None:
        asyncio.get_running_loop().call_soon(answer)
