"""The model runner: one set of weights, the members that share it, their KV cache, and the forwards over both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from genarm_fast.device.base import Device
from genarm_fast.models.forward_context import Ragged, at_positions, running
from genarm_fast.models.known_decoders import head_of
from genarm_fast.models.kv_cache import Entry, RaggedLayer
from genarm_fast.models.lora_lanes import linears_of, reread
from genarm_fast.models.member import Member
from genarm_fast.models.stacked_decoder import StackedDecoder

# Counters for attention, which uses one per row, head and tile: enough for 2,048 rows of 8 heads, 64 KB in int32.
ARRIVALS = 1 << 14


class ModelRunner:
    """Runs L members over the same weights. Each member is a lane with `slots` slots of `capacity` tokens in the cache.

    A lane gets its part of the cache when it is first reserved, so a member without requests takes no memory. All work
    goes to `stream`, and the caller launches it there.
    """

    def __init__(self, members: Sequence[Member], device: Device | None = None) -> None:
        first = members[0]
        self.members = list(members)
        self.model = model_of(members)
        self.head = head_of(self.model)
        self.device = device or Device()
        # Made before the runner's stream: that waits, when it is made, for the zeros to be written.
        self.arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, device=first.device)
        self.stream = self.device.stream(first.device)
        self.on_one_device = len({parameter.device for parameter in self.model.parameters()}) == 1
        self.context = first.context
        self.lanes = [member.lane for member in members]
        self.layers: list[RaggedLayer] = []
        self.slots = self.capacity = self.generation = 0
        self.is_intact = True  # whether the caches of all layers have these sizes
        self.blocks: dict[int, int] = {}  # lane (an index of `members`) -> its block of slots in the cache
        self._rows: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}
        self._given = [member.lane for member in members if member.given and len(members) > 1]
        self._linears = linears_of(self.model)
        self.free()

    def refresh(self) -> None:
        """Notice changes that a caller made to weights of its own models since the last run.

        Raises:
            RuntimeError: weights were moved in memory after they were loaded.
        """
        names = ", ".join(member.name for member in self.members)
        watches = [member.watch for member in self.members if member.watch is not None]
        rebound = next(filter(None, (watch.moved() for watch in watches)), None)
        if rebound is not None or any(linear.moved for linear in self._linears):
            what = "weights were" if rebound is None else f"the weight {rebound} was"
            raise RuntimeError(
                f"{names}: {what} moved in memory after loading (by share_memory(), .to() or p.data = ..., say):"
                " expected changes in place; make the GenARM after that"
            )
        if self._given:
            self.device.launch(self.stream, "reread", reread, self.model, self._given)
            if isinstance(decoder := vars(self.model.base_model).get("forward"), StackedDecoder):
                self.device.launch(self.stream, "reread", decoder.reread)

    @torch.inference_mode()
    def reserve(self, entries: Sequence[Entry | None], lanes: Sequence[int], slots: int, capacity: int) -> None:
        """Make the cache hold these lanes with at least `slots` slots of `capacity` tokens. Its contents stay.

        entries: what each layer caches of one token.

        Tensors grow one after the other, so the peak is the larger size and one tensor more. If memory runs out, the
        tensors get their old size back. If there is no memory for that either, or an interrupt comes meanwhile,
        `is_intact` is False: the cache must be freed, and its sequences must be prefilled again.
        """
        blocks = dict(self.blocks)
        for lane in lanes:
            blocks.setdefault(lane, len(blocks))
        slots, capacity = max(slots, self.slots), max(capacity, self.capacity)
        old, new = (len(self.blocks), self.slots), (len(blocks), slots)
        self.device.forget(self.stream)
        self._rows.clear()
        self.generation += 1
        self.is_intact = False
        try:
            self._resize(entries, old, new, capacity)
        except (RuntimeError, MemoryError):
            if not self.slots:
                self.free()
                raise
            with suppress(RuntimeError, MemoryError):
                self._resize(entries, new, old, self.capacity)
                self.is_intact = True
            raise
        self.blocks, self.slots, self.capacity, self.is_intact = blocks, slots, capacity, True

    def _resize(
        self, entries: Sequence[Entry | None], old: tuple[int, int], new: tuple[int, int], capacity: int
    ) -> None:
        """Give all layers' caches this capacity. old, new: (number of lanes, slots) before and after."""
        for layer, entry in zip(self.layers, entries):
            if entry is not None and layer.keys is not None:
                layer.resize(old, new, capacity)
            elif entry is not None:
                layer.slots, layer.capacity = new[0] * new[1], capacity
                layer.allocate(entry)

    def discover(self, slots: int, capacity: int) -> None:
        """Let each layer make its cache for all lanes when its first keys come. After that its `entry` is known."""
        self.blocks = {lane: lane for lane in range(len(self.members))}
        self.slots, self.capacity = slots, capacity
        for layer in self.layers:
            layer.slots, layer.capacity = len(self.blocks) * slots, capacity

    def free(self) -> None:
        """Free the cache and the graphs that use it."""
        count = self.model.config.get_text_config().num_hidden_layers
        self.layers = [RaggedLayer(0, 0) for _ in range(count)]
        self.cache = Cache(layers=list(self.layers))
        self.slots = self.capacity = 0
        self.blocks = {}
        self.is_intact = True
        self._rows.clear()
        self.device.forget(self.stream)

    @property
    def bytes(self) -> int:
        """Bytes of the KV cache."""
        return sum(states.nbytes for states in self._states())

    def rows(self, slots: Sequence[int], lanes: Sequence[int]) -> Tensor:
        """Return the rows of the cache for these slots, lane after lane, int64 [L·R] on the device."""
        key = tuple(slots), tuple(lanes)
        if key not in self._rows:
            if len(self._rows) > 64:
                self._rows.clear()
            self._rows[key] = self.device.upload(torch.tensor(self.row_index(slots, lanes)), self.stream)
        return self._rows[key]

    def row_index(self, slots: Sequence[int], lanes: Sequence[int]) -> list[int]:
        """Return the same numbers as `rows`, on the host."""
        return [self.blocks[lane] * self.slots + slot for lane in lanes for slot in slots]

    def forward(
        self, tokens: Tensor, positions: Tensor, slots: Sequence[int], kv_bound: int, lanes: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """Return the logits [R, q, V] of each lane.

        tokens, positions: int64 [L, R, q] on the runner's device. kv_bound: a number above all positions, so that the
        host need not read them.
        """
        rows = len(slots)
        if not self.on_one_device:
            return self.logits(kv_bound, lanes, tokens, positions, self.rows(slots, lanes))
        wide, kv_bound = self.device.shape(rows, self.slots, kv_bound, self.capacity)
        if wide > rows:  # pad with copies of the first row: they write the same numbers to the same place in the cache
            first = (tokens[:, :1], positions[:, :1])
            more = (each.expand(-1, wide - rows, -1) for each in first)
            tokens, positions = (torch.cat(pair, dim=1) for pair in zip((tokens, positions), more))
            slots = [*slots, *[slots[0]] * (wide - rows)]
        function = partial(self.logits, kv_bound, lanes)
        key = (tokens.shape, kv_bound, tuple(lanes), self.generation)
        logits = self.device.repeat(self.stream, key, function, tokens, positions, self.rows(slots, lanes))
        return logits if wide == rows else tuple(lane[:rows] for lane in logits)

    def prefill(
        self, tokens: Tensor, positions: Tensor, slots: Sequence[int], kv_bound: int, lanes: Sequence[int]
    ) -> None:
        """Write tokens of prompts into the cache. Arguments as in `forward`, but tokens and positions on the host."""
        tokens, positions = (self.device.upload(each, self.stream) for each in (tokens, positions))
        self._run(self.model.base_model, lanes, tokens, positions, self.rows(slots, lanes), kv_bound)

    def copy(self, source: int, target: int, length: int, lanes: Sequence[int]) -> None:
        """Copy the first `length` tokens of slot `source` to slot `target`, in these lanes."""
        for states in self._states():
            for lane in lanes:
                offset = self.blocks[lane] * self.slots
                states[offset + target, :, :length] = states[offset + source, :, :length]

    def clear(self, slot: int) -> None:
        """Zero a slot in all lanes, since its numbers may not be finite."""
        for states in self._states():
            states[slot :: self.slots] = 0

    def _states(self) -> Iterator[Tensor]:
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                yield from (layer.keys, layer.values)

    def logits(
        self, kv_bound: int, lanes: Sequence[int], tokens: Tensor, positions: Tensor, rows: Tensor
    ) -> tuple[Tensor, ...]:
        """Return logits as `forward` does, for rows of the cache [L·R], but without padding and a graph of its own."""
        if self.head is None:
            logits = self._run(self.model, lanes, tokens, positions, rows, kv_bound).logits
        else:
            logits = self._run(self.model.base_model, lanes, tokens, positions, rows, kv_bound, self.head)
        return logits.chunk(len(lanes)) if len(lanes) > 1 else (logits,)

    def _run(
        self,
        model: Any,
        lanes: Sequence[int],
        tokens: Tensor,
        positions: Tensor,
        rows: Tensor,
        kv_bound: int,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        """Return the model's output or, with a head, the head's output for the last hidden states."""
        count = tokens.shape[1]
        tokens, positions = tokens.flatten(0, 1), positions.flatten(0, 1)
        # Positions of padding may be past the end of the context.
        known = positions if self.context is None else positions.clamp_max(self.context - 1)
        ragged = Ragged(rows, positions, kv_bound, self.arrivals)
        with running([self.lanes[lane] for lane in lanes], count), at_positions(ragged):
            out = model(input_ids=tokens, position_ids=known, past_key_values=self.cache, use_cache=True)
            return out if head is None else head(out.last_hidden_state)


def model_of(members: Sequence[Member]) -> Any:
    """Return the module tree that runs members of one forward."""
    return members[0].shared if len(members) > 1 else members[0].runner


def padded(tokens: list[int], width: int) -> list[int]:
    """Return the tokens, padded to `width`. Later tokens overwrite the padding in the cache before it is read."""
    return tokens + [0] * (width - len(tokens))


def in_one_forward(members: Sequence[Member]) -> list[list[int]]:
    """Return the indices of the members, grouped by the forward that they share."""
    groups: dict[int, list[int]] = {}
    for i, member in enumerate(members):
        groups.setdefault(id(member.shared), []).append(i)
    return list(groups.values())
