"""One thread steps an engine at a time, on behalf of all; the others wait for their sequences, or for their turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Turns:
    """Who steps now, and what has to be done before the next step.

    `ask` never waits for a step: what is asked in mid-step is done after it. Where an interrupt comes in the middle of
    that, it is done once more from the beginning.
    """

    def __init__(self) -> None:
        # Taken by `with` on the lock itself, which is C. The condition's own __enter__ is Python: an interrupt inside
        # it would leave the lock held for ever.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._stepper: int | None = None
        self._queue: deque[object] = deque()  # tickets of those who wait for the turn, so that nobody is passed over
        self._inbox: deque[Callable[[], None]] = deque()
        self._lost = False  # a thread of the parent process had the turn as this one was forked

    def forked(self) -> bool:
        """In a forked process, which has this thread alone: whether a step that another one began is left half done.

        Then nobody has a turn any more.
        """
        whole = (self._stepper is None or self.mine) and self._lock.acquire(blocking=False)
        if whole:
            self._lock.release()
        else:
            self._lock = threading.RLock()
            self._stepper, self._lost = None, True
        self._changed = threading.Condition(self._lock)
        self._queue.clear()
        return not whole

    @property
    def mine(self) -> bool:
        """Whether the calling thread is in the middle of a step."""
        return self._stepper == threading.get_ident()

    def ask(self, what: Callable[[], None]) -> None:
        """Do it between two steps: at once if nobody steps."""
        if self._lost:
            return
        with self._lock:
            self._inbox.append(what)
            if self._stepper is None:
                self._answer()

    @contextmanager
    def take(self, unless: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Wait for the turn, and have it inside; or not, once `unless` says that there is no need any more.

        Gives whether the turn was taken. Raises RuntimeError in the middle of the thread's own step, and after a fork
        in the middle of another thread's.
        """
        if self._lost:
            raise RuntimeError("this process was forked in the middle of a step: expected a new call")
        if self.mine:
            raise RuntimeError("the engine is in the middle of a step of this thread: expected a call after it")
        ticket = object()
        try:
            with self._lock:
                self._queue.append(ticket)
                try:
                    while (self._stepper is not None or self._queue[0] is not ticket) and not unless():
                        self._wait()
                    if not unless():
                        self._stepper = threading.get_ident()
                finally:
                    self._queue.remove(ticket)
                    self._changed.notify_all()
                if self.mine:
                    self._answer()
            yield self.mine
        finally:
            try:
                self._give_back(ticket)
            except BaseException:  # an interrupt that came meanwhile: nobody would have a turn any more
                self._give_back(ticket)
                raise

    def _wait(self) -> None:
        """Until something changed. The lock is held afterwards, whatever happens."""
        lock: Any = self._lock
        try:
            self._changed.wait()
        finally:
            if (
                not lock._is_owned()
            ):  # the condition is Python: an interrupt came as it had let go, and did not wait yet
                lock.acquire()

    def _give_back(self, ticket: object) -> None:
        """What a thread has of the turn: itself, or a place in the queue that an interrupt left behind."""
        if self.mine or ticket in self._queue:
            with self._lock:
                if ticket in self._queue:
                    self._queue.remove(ticket)
                if self.mine:
                    self._stepper = None
                self._changed.notify_all()
                if self._stepper is None:
                    self._answer()

    def _answer(self) -> None:
        while self._inbox:
            what = self._inbox[0]
            try:
                what()
            except Exception:
                self._done(what)
                raise
            self._done(what)  # only now: an interrupt in the middle would lose what another thread asked for

    def _done(self, what: Callable[[], None]) -> None:
        """Take it out, unless what it set free has asked in turn, and done so already."""
        if self._inbox and self._inbox[0] is what:
            self._inbox.popleft()
