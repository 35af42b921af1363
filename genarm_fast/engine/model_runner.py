"""Members that run in one forward, over a static cache with a write position for every row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from genarm_fast.device.base import Device
from genarm_fast.models.forward_context import Ragged, placed, running
from genarm_fast.models.kv_cache import Entry, RaggedLayer
from genarm_fast.models.lora_lanes import linears_of, reread
from genarm_fast.models.member import Member


class Backbone:
    """L members over the same weights, and their cache: L lanes of `slots` rows with room for `capacity` tokens.

    A forward takes R of the slots with q tokens for each lane; lane after lane, they are its L·R rows. Work goes to
    `stream`, on which the caller has to launch it.
    """

    def __init__(self, members: Sequence[Member], slots: int, capacity: int, device: Device | None = None) -> None:
        first = members[0]
        self.lanes = [member.lane for member in members]
        self.model = model_of(members)
        self.device = device or Device()
        self.stream = self.device.stream(first.device)
        self.on_one_device = len({parameter.device for parameter in self.model.parameters()}) == 1
        self.context = first.context
        self.slots, self.capacity = slots, capacity
        layers = self.model.config.get_text_config().num_hidden_layers
        self.layers = [RaggedLayer(len(self.lanes) * slots, capacity) for _ in range(layers)]
        self.cache = Cache(layers=list(self.layers))
        self._rows: dict[tuple[int, ...], Tensor] = {}
        self._given = [member.lane for member in members if member.given and len(members) > 1]
        self._linears = linears_of(self.model)
        self._names = ", ".join(member.name for member in members)
        self.begin()

    def begin(self) -> None:
        """A run begins: the owner of a model may have trained it since.

        Raises:
            RuntimeError: its weights lie elsewhere now.
        """
        if any(linear.moved for linear in self._linears):
            raise RuntimeError(
                f"{self._names}: weights were moved in memory after they were loaded (by share_memory(), say): expected"
                " them in their places; make the GenARM after that"
            )
        if self._given:
            self.device.launch(self.stream, "reread", reread, self.model, self._given)

    @torch.inference_mode()
    def allocate(self, entries: Sequence[Entry | None]) -> None:
        """Make the caches now, of what each layer caches of a token."""
        for layer, entry in zip(self.layers, entries):
            if entry is not None:
                layer.allocate(entry)

    @property
    def bytes(self) -> int:
        """Of its caches."""
        return sum(states.nbytes for states in self._states())

    def rows(self, slots: Sequence[int]) -> Tensor:
        """Rows of the cache for these slots, lane after lane, int64 [L·R]."""
        key = tuple(slots)
        if key not in self._rows:
            if len(self._rows) > 64:
                self._rows.clear()
            index = [lane * self.slots + slot for lane in range(len(self.lanes)) for slot in key]
            self._rows[key] = self.device.upload(torch.tensor(index), self.stream)
        return self._rows[key]

    def forward(self, tokens: Tensor, positions: Tensor, slots: Sequence[int], limit: int) -> tuple[Tensor, ...]:
        """Tokens and positions below `limit`, int64 [L, R, q] on its device → each lane's logits [R, q, V]."""
        rows = len(slots)
        if not self.on_one_device:
            return self._logits(limit, tokens, positions, self.rows(slots))
        wide, limit = self.device.shape(rows, self.slots, limit, self.capacity)
        if wide > rows:  # with the first row again, which writes what it writes anyway
            first = (tokens[:, :1], positions[:, :1])
            more = (each.expand(-1, wide - rows, -1) for each in first)
            tokens, positions = (torch.cat(pair, dim=1) for pair in zip((tokens, positions), more))
            slots = [*slots, *[slots[0]] * (wide - rows)]
        function = partial(self._logits, limit)
        logits = self.device.repeat(self.stream, (tokens.shape, limit), function, tokens, positions, self.rows(slots))
        return logits if wide == rows else tuple(lane[:rows] for lane in logits)

    def prefill(self, tokens: Tensor, positions: Tensor, slots: Sequence[int], limit: int) -> None:
        """As `forward`, of tokens and positions on the host, but nothing is predicted."""
        tokens, positions = (self.device.upload(each, self.stream) for each in (tokens, positions))
        self._run(self.model.base_model, tokens, positions, self.rows(slots), limit)

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

    def _logits(self, limit: int, tokens: Tensor, positions: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        return self._run(self.model, tokens, positions, rows, limit).logits.chunk(len(self.lanes))

    def _run(self, model: Any, tokens: Tensor, positions: Tensor, rows: Tensor, limit: int) -> Any:
        count = tokens.shape[1]
        tokens, positions = tokens.flatten(0, 1), positions.flatten(0, 1)
        known = positions if self.context is None else positions.clamp_max(self.context - 1)  # padding may lie beyond
        with running(self.lanes, count), placed(Ragged(rows, positions, limit)):
            return model(input_ids=tokens, position_ids=known, past_key_values=self.cache, use_cache=True)


def model_of(members: Sequence[Member]) -> Any:
    """What runs these members of one forward."""
    return members[0].shared if len(members) > 1 else members[0].runner


def padded(tokens: list[int], width: int) -> list[int]:
    """The tokens and, after them, any others: what they write is overwritten before it is looked at."""
    return tokens + [0] * (width - len(tokens))


def in_one_forward(members: Sequence[Member]) -> list[list[int]]:
    """Indices of the members, those that share a forward together."""
    groups: dict[int, list[int]] = {}
    for i, member in enumerate(members):
        groups.setdefault(id(member.shared), []).append(i)
    return list(groups.values())
