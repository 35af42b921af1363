"""Limit the time and memory of other people's Python code, in any thread, without starting anything for each call."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
LIMIT_SECONDS = 10.0  # time limit of a call; a chat of a million characters renders in 20 ms
MAX_GROWTH_BYTES = 1 << 30  # bytes that the process may gain during the call
POLL_SECONDS = 0.05  # seconds between looks at the running calls


class Overrun(BaseException):
    """The watching thread raises this inside a thread that takes too long. No handler of a template catches it."""


class _Watch:
    """One thread that looks at the calls of all other threads. It sleeps while there is no call."""

    def __init__(self) -> None:
        # Use `with` on the lock itself, which is C code. The condition's own __enter__ is Python code: an Overrun
        # inside it would leave the lock held forever.
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        # By thread: the deadline, the resident bytes at the first look, and the reason why the call was stopped.
        self.calls: dict[int, list[Any]] = {}
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
        """Return why the call was stopped, or None if it was not. No Overrun is raised after this."""
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
            time.sleep(POLL_SECONDS)
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
        if resident - call[1] > MAX_GROWTH_BYTES:
            return f"it takes more than {MAX_GROWTH_BYTES >> 20} MiB"
        return f"it takes more than {LIMIT_SECONDS:g} s" if time.monotonic() > call[0] else None


def run_within_limits(function: Callable[[], Result], seconds: float | None = None) -> Result:
    """Return the function's result; the watch costs 5 µs a call.

    The function must be Python code without long operations in C, which can't be stopped.

    Raises:
        TimeoutError: the function took more time or memory than allowed.
    """
    reason = None
    try:
        _watch.begin(LIMIT_SECONDS if seconds is None else seconds)
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
    except OSError:  # not Linux: only the time is limited
        return 0


def _renew_watch() -> None:
    global _watch
    _watch = _Watch()


_watch = _Watch()
if hasattr(os, "register_at_fork"):
    # The child of a fork gets a new watch: the watching thread does not exist in the child, and locks may be held.
    os.register_at_fork(after_in_child=_renew_watch)
