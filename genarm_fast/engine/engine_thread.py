"""The engine's thread: it steps an engine for tasks of event loops, which must not wait themselves.

It works on `Call`s. Other threads may step the same engine meanwhile, for all sequences in it (`Turns`).
"""

from __future__ import annotations

import asyncio
import atexit
import math
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from genarm_fast.engine.call import END, Call, Job, receive
from genarm_fast.engine.engine import Engine
from genarm_fast.engine.sequence import Sequence

IDLE_SECONDS = 30.0  # time after which a thread without work ends; the next call starts another one in 0.1 ms
READER_WAIT_SECONDS = 0.002  # longest time that a step waits for readers that may ask for their next token soon
LOOP_CHECK_SECONDS = 1.0  # time between two checks for closed event loops, while all streams are held

_threads: weakref.WeakSet[EngineThread] = weakref.WeakSet()


class EngineThread:
    """A daemon thread that runs while there are calls, and for IDLE_SECONDS after the last one.

    It refers to an engine only while it has calls of that engine. So a model that is dropped is freed at once.
    """

    def __init__(self) -> None:
        # None asks the thread to end. A SimpleQueue, because a finaliser may call its `put` at any moment.
        self.inbox: SimpleQueue[Job | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ending = False
        _threads.add(self)

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def call(
        self, engine: Engine, sequences: list[Sequence], collect: Callable[[Sequence], Any], ahead: int | None = None
    ) -> Call:
        """Decode sequences that are new to the engine, for a task of an event loop. Arguments as in `Call`."""
        call = Call(self.inbox, engine, sequences, collect, ahead)
        with self._starting:
            self.inbox.put(lambda worker: worker.join(call))
            if not self.running:
                self._ending = False
                self._thread = threading.Thread(target=self._run, name="genarm_fast", daemon=True)
                self._thread.start()
        return call

    def end(self) -> None:
        """Let the thread end as soon as it has no calls."""
        self._ending = True
        self.inbox.put(None)

    def stop(self) -> None:
        """Close all calls, and wait for the thread's end."""
        thread = self._thread
        if thread is not None and thread.is_alive():
            self.inbox.put(lambda worker: worker.stop())
            self.end()
            thread.join()

    def _run(self) -> None:
        """Work on calls until none came for IDLE_SECONDS, or `end` was called."""
        while True:
            try:
                job = self.inbox.get(timeout=0 if self._ending else IDLE_SECONDS)
            except Empty:
                job = None
            if job is not None:
                _CallWorker(self.inbox).run(job)
                del job  # the job refers to a model
                continue
            with self._starting:
                if self.inbox.empty():
                    self._thread = None
                    return


@atexit.register
def _stop_all() -> None:
    """Stop all threads: a daemon thread that is in C++ code while the interpreter shuts down crashes the process."""
    for thread in list(_threads):
        thread.stop()


class _CallWorker:
    """The thread's work from the first call until no call is left."""

    def __init__(self, inbox: SimpleQueue[Job | None]) -> None:
        self.inbox = inbox
        self.calls: list[Call] = []
        self.outgoing: dict[asyncio.AbstractEventLoop, list[tuple[Call, Any]]] = {}
        self.reading: set[asyncio.AbstractEventLoop] = set()  # loops whose readers may ask for more at any moment
        self.busy: set[asyncio.AbstractEventLoop] = set()  # loops that took longer than that wait, not waited for again

    def run(self, job: Job) -> None:
        """Do the first job, which adds a call, and work until no call is left."""
        try:
            job(self)
            while self.calls:
                self._turn()
        except BaseException as error:
            # The error came from outside a step, for example memory that can't be freed. End all calls with it, so that
            # no task waits forever.
            for call in self.calls:
                call.failure = error
                self._post(call, END)
            self.calls.clear()
            self._send()

    def _turn(self) -> None:
        """Step the engines of calls that can go on, or wait for a job if none can; then send all news."""
        if any(call.can_advance() for call in self.calls):
            self._wait_for_readers()
            for engine in {call.engine: None for call in self.calls if call.can_advance()}:
                self._step(engine)
        elif not self.outgoing:
            self._do_next(self._pause_seconds())
        self._do_all()
        self._end_calls()
        self._send()

    def join(self, call: Call) -> None:
        """Queue a call's sequences in its engine."""
        self.calls.append(call)
        if call.ahead is not None:
            for sequence in call.sequences:
                sequence.held = True
        call.engine.join(call.sequences, call.news, stepwise=call.ahead is not None)
        self.resume(call)

    def resume(self, call: Call) -> None:
        """Let a call's sequences go on if its reader wants more."""
        if call.wants_more():
            call.stalled = False
            for sequence in call.open.values():
                sequence.held = False

    def take(self, call: Call, sequence: Sequence, item: Any, ended: bool) -> None:
        """Take the news of a sequence: an item for its task, and whether the sequence has ended."""
        if item is not None:
            self._post(call, item)
        if ended:
            call.open.pop(sequence.id, None)

    def close(self, call: Call) -> None:
        """Take all sequences of a call out of the engine; `leave` is done once they are out."""
        call.engine.abort([sequence for sequence in call.sequences if not sequence.ended])
        call.engine.turns.do_between_steps(partial(self.inbox.put, lambda worker: worker.leave(call)))

    def leave(self, call: Call) -> None:
        call.open.clear()

    def drop(self, call: Call, sequence: Sequence) -> None:
        """Take one sequence of a call out of the engine."""
        call.engine.abort([sequence])
        taken_out = partial(self.inbox.put, lambda worker: worker.take(call, sequence, None, True))
        call.engine.turns.do_between_steps(taken_out)

    def stop(self) -> None:
        for call in self.calls:
            self.close(call)

    def _post(self, call: Call, item: Any) -> None:
        self.outgoing.setdefault(call.loop, []).append((call, item))

    def _send(self) -> None:
        """Send each loop its items in one callback."""
        outgoing, self.outgoing = self.outgoing, {}
        for loop, items in outgoing.items():
            answer = None
            if any(call.stalled for call, _ in items):
                answer = partial(self.inbox.put, partial(_CallWorker.answer, loop=loop))
            try:
                loop.call_soon_threadsafe(receive, items, answer)
            except RuntimeError:  # the loop was closed
                continue
            if answer is not None and loop not in self.busy:
                self.reading.add(loop)

    def answer(self, loop: asyncio.AbstractEventLoop) -> None:
        """Stop waiting for a loop: its readers got their items, and those that read on at once have asked for more."""
        self.reading.discard(loop)
        self.busy.discard(loop)

    def _wait_for_readers(self) -> None:
        """Wait up to READER_WAIT_SECONDS, so that one step serves all of them instead of two steps a part each."""
        end = time.perf_counter() + READER_WAIT_SECONDS
        while self.reading and (remaining := end - time.perf_counter()) > 0:
            self._do_next(remaining)
        self.busy |= self.reading
        self.reading.clear()
        self._do_all()

    def _do_next(self, seconds: float) -> None:
        """Do the next job of the inbox, after waiting for it at most this long."""
        try:
            job = self.inbox.get(timeout=seconds)
        except Empty:
            return
        if job is not None:
            job(self)

    def _pause_seconds(self) -> float:
        """Return the seconds to wait while all streams are held: until a deadline, LOOP_CHECK_SECONDS at most."""
        first = min((call.deadline() for call in self.calls), default=math.inf)
        return min(LOOP_CHECK_SECONDS, max(0.0, first - time.perf_counter()))

    def _do_all(self) -> None:
        while not self.inbox.empty():
            self._do_next(0)

    def _step(self, engine: Engine) -> None:
        """Run a step, unless the inbox gets a job while this thread waits for its turn."""
        try:
            with engine.turns.take(unless=lambda: not self.inbox.empty()) as taken:
                if taken:
                    engine.step_in_turn()
        except BaseException as error:
            # An empty inbox means that the step failed without failing a sequence. It would fail again and again, so
            # the engine's calls end here.
            if self.inbox.empty():
                for call in self.calls:
                    if call.engine is engine and not call.closed:
                        call.failure = error
                        call.close()

    def _end_calls(self) -> None:
        """Send END to calls whose sequences have all ended, and close calls whose event loop was closed."""
        for call in [*self.calls]:
            if not call.open:
                self.calls.remove(call)
                self._post(call, END)
            elif call.loop.is_closed():
                call.close()
