"""A limit on the time and the memory that Python code of others takes, in any thread; nothing is started per call."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
SECONDS = 10.0  # of a call; a chat of a million characters renders in 20 ms
MOST_GROWTH = 1 << 30  # bytes that the process may gain meanwhile
POLL = 0.05  # seconds between looks at the calls that run


class Overrun(BaseException):
    """Raised by the watching thread inside the one that takes too long; no handler of a template catches it."""


class _Watch:
    """One thread that looks at the calls of all others, asleep while there is none."""

    def __init__(self) -> None:
        # Taken by `with` on the lock itself, which is C. The condition's own __enter__ is Python: an Overrun inside it
        # would leave the lock held for ever.
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.calls: dict[int, list[Any]] = {}  # by thread: when it ends, resident bytes before, why it was stopped
        self.thread: threading.Thread | None = None

    def begin(self, seconds: float) -> None:
        with self.lock:
            self.calls[threading.get_ident()] = [time.monotonic() + seconds, None, None]
            if self.thread is None or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._look, name="genarm-fast deadline", daemon=True)
                self.thread.start()
            elif len(self.calls) == 1:
                self.changed.notify()

    def end(self) -> str | None:
        """Why the call was stopped, None if it was not. No exception comes after this."""
        with self.lock:
            _, _, reason = self.calls.pop(threading.get_ident(), (0, None, None))
            if reason is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), None)
            return reason

    def _look(self) -> None:
        while True:
            with self.changed:
                while not self.calls:
                    self.changed.wait()
            time.sleep(POLL)
            with self.changed:
                for thread, call in self.calls.items():
                    if call[2] is None and (reason := self._too_much(call)):
                        call[2] = reason
                        stop = ctypes.pythonapi.PyThreadState_SetAsyncExc
                        stop(ctypes.c_ulong(thread), ctypes.py_object(Overrun))

    def _too_much(self, call: list[Any]) -> str | None:
        resident = _resident_bytes()
        if call[1] is None:
            call[1] = resident
        if resident - call[1] > MOST_GROWTH:
            return f"it takes more than {MOST_GROWTH >> 20} MiB"
        return f"it takes more than {SECONDS:g} s" if time.monotonic() > call[0] else None


def within(function: Callable[[], Result], seconds: float | None = None) -> Result:
    """The function's result: 5 µs more than a call. It must be Python code that runs no long operation of C at once.

    Raises:
        TimeoutError: it took more time or memory than it may.
    """
    reason = None
    try:
        _watch.begin(SECONDS if seconds is None else seconds)
        try:
            result = function()
        finally:
            reason = _watch.end()
    except Overrun:
        reason = reason or _watch.end() or "it takes too long"
    if reason is not None:
        raise TimeoutError(reason)
    return result


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux: time alone is limited
        return 0


def _anew() -> None:
    global _watch
    _watch = _Watch()


_watch = _Watch()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_anew)  # threads do not live on in a fork, and locks may be held
