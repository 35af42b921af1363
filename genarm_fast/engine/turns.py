"""Turns: one thread at a time steps an engine for all sequences; other threads wait for news or for their turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Turns:
    """The thread that steps now, and the jobs that have to be done before the next step.

    `do_between_steps` never waits for a step: a job that comes during a step is done after it. If an interrupt comes in
    the middle of a job, the job is done again from its beginning.
    """

    def __init__(self) -> None:
        # `with` takes the lock itself, in C code. The condition's own __enter__ is Python code: an interrupt inside it
        # would leave the lock held forever.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._stepper: int | None = None
        self._queue: deque[object] = deque()  # tickets of threads that wait for the turn, served in order
        self._jobs: deque[Callable[[], None]] = deque()
        self._forked_in_step = False  # whether this process was forked while another thread of its parent had the turn

    def forked(self) -> bool:
        """Make new locks in a forked process, which has this thread alone.

        Returns whether another thread of the parent was in the middle of a step. Then no thread gets a turn any more.
        """
        usable = (self._stepper is None or self.is_mine) and self._lock.acquire(blocking=False)
        if usable:
            self._lock.release()
        else:
            self._lock = threading.RLock()
            self._stepper, self._forked_in_step = None, True
        self._changed = threading.Condition(self._lock)
        self._queue.clear()
        return not usable

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread is in the middle of a step."""
        return self._stepper == threading.get_ident()

    def do_between_steps(self, job: Callable[[], None]) -> None:
        """Do a job between two steps: at once if no thread steps."""
        if self._forked_in_step:
            return
        with self._lock:
            self._jobs.append(job)
            if self._stepper is None:
                self._do_jobs()

    @contextmanager
    def take(self, unless: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Wait for the turn, and have it in the block. Gives True if the turn was taken.

        unless: ends the waiting when it returns True; then the turn is not taken.

        Raises RuntimeError during a step of the same thread, and after a fork during a step of another thread.
        """
        if self._forked_in_step:
            raise RuntimeError("this process was forked in the middle of a step: expected a new call")
        if self.is_mine:
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
                if self.is_mine:
                    self._do_jobs()
            yield self.is_mine
        finally:
            try:
                self._give_back(ticket)
            except BaseException:  # an interrupt came meanwhile; without this, no thread would get a turn any more
                self._give_back(ticket)
                raise

    def _wait(self) -> None:
        """Wait until something has changed. The lock is held afterwards, also after an interrupt."""
        lock: Any = self._lock
        try:
            self._changed.wait()
        finally:
            # The condition is Python code: an interrupt may come after it has released the lock and before it waits.
            if not lock._is_owned():
                lock.acquire()

    def _give_back(self, ticket: object) -> None:
        """Give back the turn, or the place in the queue that an interrupt left behind."""
        if self.is_mine or ticket in self._queue:
            with self._lock:
                if ticket in self._queue:
                    self._queue.remove(ticket)
                if self.is_mine:
                    self._stepper = None
                self._changed.notify_all()
                if self._stepper is None:
                    self._do_jobs()

    def _do_jobs(self) -> None:
        """Do all jobs of the inbox."""
        while self._jobs:
            job = self._jobs[0]
            try:
                job()
            except Exception:
                self._done(job)
                raise
            self._done(job)  # removed last, so that an interrupt does not lose another thread's job

    def _done(self, job: Callable[[], None]) -> None:
        """Remove a job, unless it is removed already: objects that the job freed may have asked for jobs in turn."""
        if self._jobs and self._jobs[0] is job:
            self._jobs.popleft()
