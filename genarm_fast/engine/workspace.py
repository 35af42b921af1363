"""What a run leaves for the next one: streams, caches and graphs, so that one prompt at a time pays for them once.

What slots still hold does not matter: a row attends to what it has written itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from genarm_fast.device.base import Device, Stream
from genarm_fast.engine.model_runner import Backbone
from genarm_fast.models.member import Member

LEAST = 1 << 26  # bytes of caches that are kept, where the weights take less


@dataclass
class Room:
    """Where a run takes place: the stream that samples and settles, and a backbone for each of its groups of members.

    slots: how many of those that the caches have are for its rows.
    """

    device: Device
    main: Stream
    backbones: list[Backbone]
    groups: list[list[Member]]
    slots: int = 0

    @property
    def bytes(self) -> int:
        return sum(backbone.bytes for backbone in self.backbones)

    def serves(self, groups: Sequence[Sequence[Member]], slots: int, capacity: int) -> bool:
        same = [list(map(id, group)) for group in groups] == [list(map(id, group)) for group in self.groups]
        return same and all(each.slots >= slots and each.capacity >= capacity for each in self.backbones)


class Rooms:
    """Keeps the room of the last run, unless its caches take more than the weights of the members.

    A run owns the room that it took, so runs at one time have one each.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self._left: list[Room] = []

    def take(
        self, groups: Sequence[Sequence[Member]], slots: int, capacity: int, cache_bytes: int | None
    ) -> Room | None:
        """The one that was left, if it is large enough; else it is freed."""
        try:
            room = self._left.pop()  # at once, so that no other thread takes it too
        except IndexError:
            return None
        if not room.serves(groups, slots, capacity) or (cache_bytes is not None and room.bytes > cache_bytes):
            return None
        room.slots = slots
        room.device.begin()
        for backbone in room.backbones:
            backbone.begin()
        return room

    def leave(self, room: Room) -> None:
        """After a run that has finished on its device."""
        if room.backbones and room.bytes <= self.most:
            self._left[:] = [room]

    def clear(self) -> None:
        self._left.clear()

    @cached_property
    def most(self) -> int:
        weights = {p.data_ptr(): p.nbytes for member in self.members for p in member.model.parameters()}
        return max(sum(weights.values()), LEAST)
