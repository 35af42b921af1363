"""One load of models at a time in a process.

transformers' and PEFT's `from_pretrained` change what all threads share, and put it back at their end: torch's default
dtype, the functions of `torch.nn.init`, how modules register parameters, the level of logging. Two loads at a time put
back what the other one had set: then models have another dtype than asked for, and later ones no initial weights.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()


@contextmanager
def one_load() -> Iterator[None]:
    """Waits until no other thread loads. Also a decorator: `@one_load()`."""
    with _lock:
        yield


def _anew() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_anew)  # threads do not live on in a fork, and the lock may be held
