"""Members that run in one forward, over a static cache with a write position for every row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .attention import Ragged, RaggedLayer, placed
from .lanes import running
from .members import Member


class Backbone:
    """L members over the same weights, and their cache: L lanes of `slots` rows with room for `capacity` tokens.

    A forward takes R of the slots with q tokens for each lane; lane after lane, they are its L·R rows.
    """

    def __init__(self, members: Sequence[Member], slots: int, capacity: int) -> None:
        first = members[0]
        self.lanes = [member.lane for member in members]
        self.model: Any = first.shared if len(members) > 1 else first.runner
        self.device = first.device
        self.context = first.context
        self.slots, self.capacity = slots, capacity
        layers = self.model.config.get_text_config().num_hidden_layers
        self.layers = [RaggedLayer(len(self.lanes) * slots, capacity) for _ in range(layers)]
        self.cache = Cache(layers=list(self.layers))
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def rows(self, slots: Sequence[int]) -> Tensor:
        """Rows of the cache for these slots, lane after lane, int64 [L·R]."""
        key = tuple(slots)
        if key not in self._rows:
            if len(self._rows) > 64:
                self._rows.clear()
            index = [lane * self.slots + slot for lane in range(len(self.lanes)) for slot in key]
            self._rows[key] = torch.tensor(index, device=self.device)
        return self._rows[key]

    def forward(self, tokens: Tensor, positions: Tensor, slots: Sequence[int], limit: int) -> tuple[Tensor, ...]:
        """Tokens and positions below `limit`, int64 [L, R, q] → each lane's logits [R, q, V]."""
        return self._run(self.model, tokens, positions, slots, limit).logits.chunk(len(self.lanes))

    def prefill(self, tokens: Tensor, positions: Tensor, slots: Sequence[int], limit: int) -> None:
        """As `forward`, but nothing is predicted."""
        self._run(self.model.base_model, tokens, positions, slots, limit)

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first tokens of slot `source`, in every lane."""
        for states in self._states():
            for lane in range(len(self.lanes)):
                offset = lane * self.slots
                states[offset + target, :, :length] = states[offset + source, :, :length]

    def clear(self, slot: int) -> None:
        """Forget a slot whose numbers may not be finite."""
        for states in self._states():
            states[slot :: self.slots] = 0

    def _states(self) -> Iterator[Tensor]:
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                yield from (layer.keys, layer.values)

    def _run(self, model: Any, tokens: Tensor, positions: Tensor, slots: Sequence[int], limit: int) -> Any:
        tokens, positions = (each.flatten(0, 1).to(self.device) for each in (tokens, positions))
        known = positions if self.context is None else positions.clamp_max(self.context - 1)  # padding may lie beyond
        with running(self.lanes, len(slots)), placed(Ragged(self.rows(slots), positions, limit)):
            return model(input_ids=tokens, position_ids=known, past_key_values=self.cache, use_cache=True)


def padded(tokens: list[int], width: int) -> list[int]:
    """The tokens and, after them, any others: what they write is overwritten before it is looked at."""
    return tokens + [0] * (width - len(tokens))


def in_one_forward(members: Sequence[Member]) -> list[list[int]]:
    """Indices of the members, those that share a forward together."""
    groups: dict[int, list[int]] = {}
    for i, member in enumerate(members):
        groups.setdefault(id(member.shared), []).append(i)
    return list(groups.values())
