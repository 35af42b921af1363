"""A lock that lets only one load of models run at a time in a process.

transformers' and PEFT's `from_pretrained` change settings that all threads share, and restore them at their end:
torch's default dtype, the functions of `torch.nn.init`, how modules register parameters, and the level of logging. Two
loads at a time restore what the other load had set. Models then get another dtype than asked for, and models loaded
later get no initial weights.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()


@contextmanager
def one_load() -> Iterator[None]:
    """Wait until no other thread loads, and hold the lock inside the block. Also a decorator: `@one_load()`."""
    with _lock:
        yield


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # The child of a fork gets a new lock, because a thread that held the old one does not exist in the child.
    os.register_at_fork(after_in_child=_renew_lock)
