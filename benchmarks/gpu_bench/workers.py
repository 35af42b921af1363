"""Run rows in a separate process.

An error on a GPU spoils the process that made it, and a kernel that hangs cannot be interrupted. In both cases the
process is ended, and a reserve process, which has finished its imports by then, runs the next rows.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from .prepare import die_with_parent
from .schedule import Row, attempt

GRACE = 10.0  # seconds that a row has to end by itself after its time is up
START = 120.0  # seconds that the imports of a process may take from a cold disk


def serve(connection: Any, module: str, setting: str, stacks: str) -> None:
    """Run the rows that the connection names, one after another, until it is closed.

    module: name of a module with `MACHINE`, `ROWS` and `benching`, like `rows`. stacks: file to which a signal writes
    the Python stacks of all threads.
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    with open(stacks, "w") as file:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file)
        source = importlib.import_module(module)
        rows, group = {row.name: row for row in (source.MACHINE, *source.ROWS)}, ""
        with source.benching(setting) as bench, suppress(EOFError):
            connection.send(("ready", {}))
            while True:
                name, seconds = connection.recv()
                bench.keep = lambda so_far: connection.send(("so far", so_far))
                bench.so_far = {}
                if rows[name].group != group:
                    group = rows[name].group
                    if attempt(Row("leave", _leave), bench, seconds):
                        connection.send(("spoilt", {}))
                        return
                entry = attempt(rows[name], bench, seconds)
                if "error" in entry and not attempt(Row("leave", _leave), bench, seconds):
                    group = ""  # the GPU still works, and the row's models are released
                elif "traceback" in entry:
                    entry["spoilt"] = 1
                connection.send(("entry", entry))


def _leave(bench: Any) -> dict[str, Any]:
    bench.leave()
    return {}


class Worker:
    """A process that runs rows."""

    def __init__(self, module: str, setting: str) -> None:
        context = get_context("spawn")
        handle, self.stacks = tempfile.mkstemp(prefix="stacks-")
        os.close(handle)
        self.connection, theirs = context.Pipe()
        arguments = (theirs, module, setting, self.stacks)
        self.process = context.Process(target=serve, args=arguments, daemon=False)
        self.process.start()
        theirs.close()  # the connection now closes when the process ends
        self.ready = False

    def run(
        self, row: Row, seconds: float, keep: Callable[[dict[str, Any]], None]
    ) -> tuple[dict[str, Any] | None, bool]:
        """Run a row. Return its entry (None if the process could not start it), and whether it can run another row."""
        so_far: dict[str, Any] = {}
        kind: str | None = "ready" if self.ready else None
        until = time.monotonic() + (START if kind is None else 0)
        try:
            while kind is None:
                kind, _ = self._next(until)
            self.ready = True
            self.connection.send((row.name, seconds))
            until = time.monotonic() + seconds + GRACE
            while True:
                kind, found = self._next(until)
                if kind == "spoilt":  # an earlier GPU error keeps its memory from being freed
                    return None, False
                if kind == "entry":
                    return found, not found.pop("spoilt", 0)
                so_far = found
                keep(found)
        except TimeoutError:
            entry = {"error": f"its process hung for {seconds:.0f} s" if self.ready else "its process did not start"}
            entry["traceback"] = self._stacks()
        except (EOFError, OSError):
            self.process.join(GRACE)
            entry = {"error": f"its process ended with {self.process.exitcode}", "traceback": self._read()}
        return entry | ({"so_far": so_far} if so_far else {}), False

    def _next(self, until: float) -> tuple[str, dict[str, Any]]:
        if not self.connection.poll(max(until - time.monotonic(), 0)):
            raise TimeoutError
        return self.connection.recv()

    def _stacks(self) -> str:
        """Return the current Python stacks of all threads of the process."""
        with suppress(OSError):
            os.kill(self.process.pid, signal.SIGUSR1)  # type: ignore[arg-type]
            time.sleep(0.5)
        return self._read()

    def _read(self) -> str:
        return Path(self.stacks).read_text()[:4000]

    def end(self) -> None:
        """End the process, even if it hangs."""
        with suppress(OSError):
            self.connection.close()
        if self.process.is_alive() and self.ready:
            self.process.join(1)  # a process that waits for a row ends by itself
        self.process.kill()
        self.process.join(GRACE)
        Path(self.stacks).unlink(missing_ok=True)


class Workers:
    """A process that runs the rows, and a process in reserve."""

    def __init__(self, module: str, setting: str) -> None:
        self.module, self.setting = module, setting
        self.worker, self.reserve = self._new(), self._new()

    def _new(self) -> Worker:
        return Worker(self.module, self.setting)

    def run(self, row: Row, seconds: float, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        while True:
            entry, sound = self.worker.run(row, seconds, keep)
            if not sound:
                self.worker.end()
                self.worker, self.reserve = self.reserve, self._new()
            if entry is not None:  # None came from leaving the last group, which a new process need not do
                return entry

    def end(self) -> None:
        for worker in (self.worker, self.reserve):
            worker.end()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        self.end()


def interrupted(*_: Any) -> None:
    """Handle SIGTERM like Ctrl-C, so that all processes are ended and the table is written."""
    print("ended by SIGTERM", file=sys.stderr)
    raise KeyboardInterrupt
