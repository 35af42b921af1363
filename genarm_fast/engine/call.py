"""What a task of an event loop waits for while the engine's thread steps.

Whatever the task asks for goes through the thread's inbox, and whatever comes of a step goes back to each loop at
once. So neither side holds a lock that the other one waits for.
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

Job = Callable[[Any], None]  # what the thread is to do, given its `_Shift`
END = object()  # the item after a call's last one


class Call:
    """Sequences that a task waits for. Made in its event loop, by `EngineThread.call`.

    collect: makes an item of a sequence that has news, or None; called in the thread that steps, at the end of the
    step. ahead: how many items of each sequence may be made before the task asks for them; None: any number.

    asked and made count items; whoever changes one looks at `stalled` or at the other one afterwards, so that a call
    that may go on is never left waiting.
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
        self.open = {sequence.id: sequence for sequence in sequences}  # the thread's own: those that are to end yet

    # In the event loop:

    async def next(self) -> Any:
        """The next item. Cancelled, it closes the call.

        Raises:
            StopAsyncIteration: there is none.
            RuntimeError: another task waits for it, or it belongs to another event loop.
        """
        if self._waiters:
            raise RuntimeError("another task waits for the next chunk: expected one reader")
        if asyncio.get_running_loop() is not self.loop:
            raise RuntimeError("expected the event loop in which it began")
        self.asked += 1
        if self.stalled:
            self.inbox.put(lambda shift: shift.resume(self))
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
        """Have unfinished sequences taken out, in mid-step after the step. Waits for nothing; from any thread."""
        if not (self.closed or self.over):
            self.closed = True
            self.inbox.put(lambda shift: shift.close(self))

    async def closing(self) -> None:
        """Close it, and wait until the sequences are out.

        Raises RuntimeError in another event loop, where it is closed, but can't be waited for.
        """
        self.close()
        if not self.over and asyncio.get_running_loop() is not self.loop:
            raise RuntimeError("closed, but its end can be waited for in the event loop in which it began alone")
        while not self.over:
            await self._changed()

    def drop(self, sequence: Sequence) -> None:
        """Have one unfinished sequence taken out, while the others go on."""
        self.inbox.put(lambda shift: shift.drop(self, sequence))

    def steer(self, sequence: Sequence, weights: tuple[Weight, ...]) -> None:
        """Draw a sequence's next token with other weights, before what is asked for after this."""
        self.inbox.put(lambda _: self.engine.steer(sequence, weights))

    async def _changed(self) -> None:
        waiter = self.loop.create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            self._waiters.remove(waiter)

    def receive(self, item: Any) -> None:
        if item is END:
            self.over = True
        else:
            self.items.append(item)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    # In the thread that steps:

    def news(self, sequence: Sequence) -> None:
        """A step advanced a sequence."""
        item = self.collect(sequence)
        self.made += item is not None
        if self.ahead is not None:
            self.stalled = True
            if self.wanted():
                self.stalled = sequence.held = False
        ended = sequence.ended
        self.inbox.put(lambda shift: shift.take(self, sequence, item, ended))

    def wanted(self) -> bool:
        """Whether the reader has asked for more than there is, or will be glad of it."""
        return self.ahead is None or self.asked + self.ahead > self.made

    # In the engine's thread:

    def runs(self) -> bool:
        """Whether a step would advance it, or end what nobody reads: its time may be over."""
        found, gone, now = False, [], time.perf_counter()
        for sequence in self.open.values():
            found = not sequence.ended and (not sequence.held or sequence.late(now))
            if found:
                break
            if sequence.finish_reason == "cancelled":  # by somebody else, who told nobody
                gone.append(sequence.id)
        for key in gone:
            del self.open[key]
        return found

    def deadline(self) -> float:
        """When the first time of those that have not ended is over, by the clock of `perf_counter`; or never."""
        times = (each.deadline for each in self.open.values() if not each.ended and each.deadline is not None)
        return min(times, default=math.inf)


def receive(items: list[tuple[Call, Any]], answer: Callable[[], None] | None) -> None:
    """In the event loop: give out what a step made. `answer` is called when tasks that wait for it have run."""
    for call, item in items:
        call.receive(item)
    if answer is not None:
        asyncio.get_running_loop().call_soon(answer)
