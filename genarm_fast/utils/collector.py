"""Python's collector of circles, where it would only look again and again at what stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_waits() -> Iterator[None]:
    """For imports and loading: no collections meanwhile, and what was made then counts as old without a look at it.

    torch and transformers make a million objects that stay. From process start to a loaded SmolLM2-135M the collector
    takes 1.3 of 10 s of CPU. Nothing is done where it is off already, and what the caller froze stays frozen.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()  # into the oldest generation
        gc.enable()
