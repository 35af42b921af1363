"""Attention over a static cache in which every row writes where it stands: transformers' cache layer and attention.

A row's entry j of the cache is its token at position j, so a query at position p attends 0..p, and what lies beyond is
left-over or padding that the row will overwrite before it gets there. Rolling back is stepping back: nothing is moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin

from genarm_fast.kernels.ragged_attention import ragged_append, ragged_attention

IMPLEMENTATION = "genarm_fast_ragged"  # has no mask function, so transformers makes no mask
UNSUPPORTED = ("s_aux", "position_bias")  # attention sinks and biases would be lost


class Ragged(NamedTuple):
    """Where the tokens of a forward go. slots: int64 [N], rows of the cache. positions: int64 [N, q].

    limit: above all positions, known without reading them.
    """

    slots: Tensor
    positions: Tensor
    limit: int

    def to(self, device: torch.device) -> Ragged:
        if self.slots.device == device:
            return self
        return Ragged(self.slots.to(device), self.positions.to(device), self.limit)


_active: ContextVar[Ragged] = ContextVar("rows of the running forward")  # threads have their own


@contextmanager
def placed(ragged: Ragged) -> Iterator[None]:
    """Forwards inside write and attend here."""
    token = _active.set(ragged)
    try:
        yield
    finally:
        _active.reset(token)


def place(device: torch.device) -> Ragged:
    """Of the running forward, for a layer on this device."""
    return _active.get().to(device)


class Entry(NamedTuple):
    """What a layer caches of one token."""

    heads: int
    widths: tuple[int, int]  # of keys and of values
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        return self.heads * sum(self.widths) * self.dtype.itemsize


class RaggedLayer(CacheLayerMixin):
    """Keys and values of a layer, [slots, heads, capacity, dim]; made when the first ones come, or by `allocate`."""

    is_sliding = False

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__()
        self.slots, self.capacity = slots, capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        widths = (key_states.shape[-1], value_states.shape[-1])
        self.allocate(Entry(key_states.shape[1], widths, key_states.dtype, key_states.device))

    def allocate(self, entry: Entry) -> None:
        self.keys, self.values = (
            torch.zeros(self.slots, entry.heads, self.capacity, width, dtype=entry.dtype, device=entry.device)
            for width in entry.widths
        )
        self.is_initialized = True

    def grow(self, entry: Entry, old: tuple[int, int], new: tuple[int, int], capacity: int) -> None:
        """Take more (lanes, slots) and tokens; what each lane's slot holds stays in that lane's slot."""
        kept = (self.keys, self.values), self.capacity
        self.slots, self.capacity = new[0] * new[1], capacity
        try:
            self.allocate(entry)
        except BaseException:
            (self.keys, self.values), self.capacity = kept
            self.slots = old[0] * old[1]
            raise
        for before, after in zip(kept[0], (self.keys, self.values)):
            if before is not None and after is not None:
                (lanes, slots), shape = old, before.shape
                whole = after.view(*new, *after.shape[1:])
                whole[:lanes, :slots, :, : shape[2]] = before.view(lanes, slots, *shape[1:])

    @property
    def entry(self) -> Entry | None:
        """None before the first keys, and for ever in a layer that reads those of another."""
        if self.keys is None or self.values is None:
            return None
        widths = (self.keys.shape[-1], self.values.shape[-1])
        return Entry(self.keys.shape[1], widths, self.keys.dtype, self.keys.device)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new ones; what `attend` gets is the whole cache."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        where = place(key_states.device)
        assert self.keys is not None
        assert self.values is not None
        ragged_append(self.keys, self.values, key_states, value_states, where.slots, where.positions)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.capacity, 0


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function. query: [N, heads, q, dim] → [N, q, heads, dim]."""
    if attention_mask is not None or any(kwargs.get(name) is not None for name in UNSUPPORTED):
        raise NotImplementedError(f"{type(module).__name__} asks for more than causal attention")
    where = place(query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return (
        ragged_attention(
            query,
            key,
            value,
            where.slots,
            where.positions,
            scale=scale,
            window=sliding_window,
            softcap=softcap,
            limit=where.limit,
        ),
        None,
    )


AttentionInterface.register(IMPLEMENTATION, attend)
