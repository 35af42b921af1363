"""A static key-value cache in which every row writes at its own position: a cache layer of transformers.

A row's entry j of the cache is its token at position j, so a query at position p attends to entries 0..p. Later entries
are left over from earlier use or padding, and the row overwrites them before it reads them. A roll-back lowers a
position and moves nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from genarm_fast.kernels.ragged_attention import ragged_append
from genarm_fast.models.forward_context import current_positions


class Entry(NamedTuple):
    """What a layer caches of one token."""

    heads: int
    widths: tuple[int, int]  # width of the keys, width of the values
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        return self.heads * sum(self.widths) * self.dtype.itemsize


class RaggedLayer(CacheLayerMixin):
    """Keys and values of a layer, [slots, heads, capacity, dim]. `allocate` or the first `update` makes them."""

    is_sliding = False

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__()
        self.slots, self.capacity = slots, capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        widths = (key_states.shape[-1], value_states.shape[-1])
        self.allocate(Entry(key_states.shape[1], widths, key_states.dtype, key_states.device))

    def allocate(self, entry: Entry) -> None:
        rows, device = (self.slots, entry.heads, self.capacity), entry.device
        self.keys, self.values = (zeros(rows, width, entry.dtype, device) for width in entry.widths)
        self.is_initialized = True

    def resize(self, old: tuple[int, int], new: tuple[int, int], capacity: int) -> None:
        """Change the numbers of (lanes, slots) and the capacity in tokens. Each lane's slot keeps what still fits.

        Each old tensor is freed before the next new one is made, so memory holds at most one tensor above the larger
        size. If memory runs out in between, the keys have the new size and the values the old one; the reverse call
        restores both.
        """
        lanes, slots = min(old[0], new[0]), min(old[1], new[1])
        for name in ("keys", "values"):
            before: Tensor = getattr(self, name)
            rows, heads, tokens, width = before.shape
            if (rows, tokens) != (new[0] * new[1], capacity):
                after = zeros((new[0] * new[1], heads, capacity), width, before.dtype, before.device)
                kept = slice(lanes), slice(slots), slice(None), slice(min(tokens, capacity))
                after.view(*new, *after.shape[1:])[kept] = before.view(*old, heads, tokens, width)[kept]
                setattr(self, name, after)
                del after
            # Without this, the old tensor would stay while the next one is made, and as long as an error's traceback
            # lives.
            del before
        self.slots, self.capacity = new[0] * new[1], capacity

    @property
    def entry(self) -> Entry | None:
        """What the layer caches of one token.

        None before the first keys, and always in a layer that reads another layer's keys and values.
        """
        if self.keys is None or self.values is None:
            return None
        widths = (self.keys.shape[-1], self.values.shape[-1])
        return Entry(self.keys.shape[1], widths, self.keys.dtype, self.keys.device)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values, and return the whole cache, which `attend` reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        where = current_positions(key_states.device)
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


def zeros(rows: tuple[int, int, int], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a tensor of a cache, filled with zeros. All memory of caches comes from here."""
    return torch.zeros(*rows, width, dtype=dtype, device=device)
