"""Facts about the running forward: which LoRA lanes run, and where the tokens go in the cache.

Modules deep inside transformers read these facts here, since the arguments of their forwards have no place for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from genarm_fast.device.base import no_autocast
from genarm_fast.kernels.linear import Span


class Ragged(NamedTuple):
    """Where the tokens of a forward go.

    slots: int64 [N], rows of the cache. positions: int64 [N, q]. kv_bound: a number above all positions, known without
    reading them. arrivals: the argument of `ragged_attention`, on the device of `slots`; only for forwards that never
    run at the same time.
    """

    slots: Tensor
    positions: Tensor
    kv_bound: int
    arrivals: Tensor | None = None

    def to(self, device: torch.device) -> Ragged:
        if self.slots.device == device:
            return self
        return Ragged(self.slots.to(device), self.positions.to(device), self.kv_bound)


# Each thread has its own value of a context variable.
_positions: ContextVar[Ragged] = ContextVar("where the tokens of the running forward go")
_lanes: ContextVar[tuple[Sequence[int], int]] = ContextVar("lanes of the running forward, sequences of each")


@contextmanager
def at_positions(ragged: Ragged) -> Iterator[None]:
    """Run forwards inside the block with tokens that go where `ragged` says."""
    token = _positions.set(ragged)
    try:
        yield
    finally:
        _positions.reset(token)


def current_positions(device: torch.device) -> Ragged:
    """Return slots and positions of the running forward's tokens, on this device."""
    return _positions.get().to(device)


@contextmanager
def running(lanes: Sequence[int], rows: int) -> Iterator[None]:
    """Run forwards inside the block with these lanes, `rows` sequences each, one lane after the other."""
    token = _lanes.set((lanes, rows))
    try:
        with no_autocast():
            yield
    finally:
        _lanes.reset(token)


def running_lanes() -> tuple[Sequence[int], int]:
    """Return the lanes of the running forward, in the order of their rows, and the number of sequences of each lane."""
    return _lanes.get()


def spans_of(index: Mapping[int, int], block: int) -> tuple[Span, ...]:
    """Return the span of rows of each running lane that has an adapter.

    index: from a lane to the number of its adapter. block: tokens of each sequence; the rows are those of a flattened
    [sequences, block].
    """
    lanes, rows = _lanes.get()
    size = rows * block
    return tuple((i * size, (i + 1) * size, index[lane]) for i, lane in enumerate(lanes) if lane in index)
