"""Render templates in a helper process. A template that takes too long brings down only that process."""

from __future__ import annotations

import json
import os
import pickle
import selectors
import subprocess
import sys
import time
from pathlib import Path
from threading import Lock
from typing import Any

from genarm_fast.text import deadline

START_SECONDS = 120.0  # seconds until the process is ready; it takes 1 to 6 s on a slow disk
WORKER = Path(__file__).with_name("render_worker.py")


class Helper:
    """The helper process. It starts at the first call, and starts again after it had to be ended."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.process: Any = None

    def render(self, most: int, options: dict[str, Any]) -> dict[str, Any]:
        """Return the worker's reply: the text, its number of characters if above `most`, or an error and its message.

        Raises:
            TimeoutError: the worker took too long.
        """
        data = pickle.dumps((most, options))
        with self.lock:
            try:
                if self.process is None or self.process.poll() is not None:
                    self.process = subprocess.Popen(
                        [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
                    )
                    self._reply(START_SECONDS)
                self.process.stdin.write(len(data).to_bytes(8, "little") + data)
                return self._reply(deadline.LIMIT_SECONDS)
            except BaseException as error:
                self._end()
                if isinstance(error, (BrokenPipeError, EOFError)):
                    return {"error": "MemoryError", "message": "the process that rendered it ended"}
                raise

    def _reply(self, seconds: float) -> Any:
        end = time.monotonic() + seconds
        size = int.from_bytes(self._read(8, end, seconds), "little")
        return json.loads(self._read(size, end, seconds))

    def _read(self, size: int, end: float, seconds: float) -> bytes:
        data = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while len(data) < size:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError(f"it takes more than {seconds:g} s")
                block = os.read(self.process.stdout.fileno(), min(size - len(data), 1 << 20))
                if not block:
                    raise EOFError
                data += block
        return bytes(data)

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


def _renew_helper() -> None:
    global shared_helper
    shared_helper = Helper()


shared_helper = Helper()
if hasattr(os, "register_at_fork"):
    # The child of a fork gets a new helper, because it must not use its parent's pipes.
    os.register_at_fork(after_in_child=_renew_helper)
