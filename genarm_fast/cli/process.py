"""How the command's process handles signals, and standard streams that are closed or have a narrow encoding."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Terminated(KeyboardInterrupt):
    """A signal asked the process to end. It is handled like Ctrl-C, so that a job reports how far it got."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise Terminated inside the block. Ignored signals stay ignored, as under nohup."""
    if current_thread() is not main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise Terminated(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    changed = [number for number, handler in before.items() if handler == signal.SIG_DFL]
    for number in changed:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, before[number])


def usable_streams() -> None:
    """Make closed streams read and write nothing, and write characters that a narrow encoding lacks as escapes."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (as long as the process lives)
        elif mode == "w" and hasattr(stream, "reconfigure") and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def typed(text: str) -> str:
    r"""Return text of a standard input without the byte order mark of Windows, and with lines ended by \n."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def input_path(path: Path) -> Path:
    """Return the file that an option names. `-` is the standard input, unless a file has that name."""
    return Path("/dev/stdin") if str(path) == "-" and not path.exists() else path


def forget_output() -> None:
    """Keep the interpreter's last flush from failing too, when nobody reads on or the disk is full."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
