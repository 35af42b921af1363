"""What is true of one running forward: which LoRA lanes run, and where the tokens go in the cache.

Modules deep inside transformers read it here, since their own arguments have no place for it.
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
    """Where the tokens of a forward go. slots: int64 [N], rows of the cache. positions: int64 [N, q].

    kv_bound: above all positions, known without reading them. arrivals: of `ragged_attention`, on the device of
    slots, for forwards of which none runs while another one does.
    """

    slots: Tensor
    positions: Tensor
    kv_bound: int
    arrivals: Tensor | None = None

    def to(self, device: torch.device) -> Ragged:
        if self.slots.device == device:
            return self
        return Ragged(self.slots.to(device), self.positions.to(device), self.kv_bound)


# Threads have their own.
_placed: ContextVar[Ragged] = ContextVar("where the tokens of the running forward go")
_lanes: ContextVar[tuple[Sequence[int], int]] = ContextVar("lanes of the running forward, sequences of each")


@contextmanager
def placed(ragged: Ragged) -> Iterator[None]:
    """Forwards inside write and attend here."""
    token = _placed.set(ragged)
    try:
        yield
    finally:
        _placed.reset(token)


def place(device: torch.device) -> Ragged:
    """Of the running forward, for a layer on this device."""
    return _placed.get().to(device)


@contextmanager
def running(lanes: Sequence[int], rows: int) -> Iterator[None]:
    """Forwards inside run these lanes, each with so many rows, one lane after the other."""
    token = _lanes.set((lanes, rows))
    try:
        with no_autocast():
            yield
    finally:
        _lanes.reset(token)


def running_lanes() -> tuple[Sequence[int], int]:
    """The lanes of the running forward, in the order of their rows, and how many sequences each has."""
    return _lanes.get()


def spans_of(index: Mapping[int, int], block: int) -> tuple[Span, ...]:
    """Rows of each running lane that has one of the adapters, with blocks of so many tokens: the flattened ones."""
    lanes, rows = _lanes.get()
    size = rows * block
    return tuple((i * size, (i + 1) * size, index[lane]) for i, lane in enumerate(lanes) if lane in index)
