"""How many slots there are: as many as asked for, unless their caches take more memory than allowed, or than there is.

Slots are alike, so the longest request sets what each of them takes: a little more where there is memory, so that the
next run can have them. A request without room even alone fails alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from genarm_fast.device import Device, device_for
from genarm_fast.device.base import out_of_memory
from genarm_fast.engine.model_runner import Backbone
from genarm_fast.engine.selfcheck import entries_of
from genarm_fast.engine.sequence import Row
from genarm_fast.engine.workspace import Room, Rooms
from genarm_fast.models.kv_cache import Entry
from genarm_fast.models.member import Member


def make_room(
    groups: Sequence[Sequence[Member]],
    rows: Sequence[Row],
    needs: Sequence[int],
    slots: int,
    cache_bytes: int | None,
    rooms: Rooms,
) -> Room:
    """A backbone with its caches for each group of members, with at most so many slots; none if no row fits.

    needs: tokens of each row. Rows that do not fit get their `error` set.
    """
    entries = [entries_of(members) for members in groups]
    token = sum(map(token_bytes, groups))
    if cache_bytes is not None:
        for row, need in zip(rows, needs):
            if need * token > cache_bytes:
                row.error = MemoryError(
                    f"{need} tokens take {need * token:,} bytes of cache: expected at most cache_bytes={cache_bytes:,}"
                )
    room: Room | None = None
    while fitting := [(row, need) for row, need in zip(rows, needs) if row.error is None]:
        capacity = max(need for _, need in fitting)
        count = min(slots, len(fitting))
        if cache_bytes is not None:
            count = min(count, cache_bytes // (capacity * token))
        if (left := rooms.take(groups, count, capacity, cache_bytes)) is not None:
            return left
        room = room or open_room(groups)
        most = roomy(capacity)
        if cache_bytes is not None and count * most * token > cache_bytes:
            most = capacity
        while count:
            try:
                room.backbones = [_allocated(*each, count, most, room.device) for each in zip(groups, entries)]
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # whose frames hold caches
            else:
                room.slots = count
                return room
            count, most = (count, capacity) if most > capacity else (count // 2, capacity)
        for row, need in fitting:
            if need == capacity:
                row.error = MemoryError(f"{need} tokens take {need * token:,} bytes of cache: out of memory")
                row.error.__cause__ = failure
    return room or open_room(groups)


def token_bytes(group: Sequence[Member]) -> int:
    """What members of one forward cache of a token."""
    return len(group) * sum(entry.bytes for entry in entries_of(group) if entry is not None)


def roomy(capacity: int) -> int:
    """Tokens, raised to one of few numbers: by 63 or an eighth at most."""
    step = max(64, (1 << capacity.bit_length()) // 16)
    return -(-capacity // step) * step


def open_room(groups: Sequence[Sequence[Member]]) -> Room:
    """Without caches."""
    devices = [member.device for group in groups for member in group]
    device = device_for(devices)
    return Room(device, device.stream(devices[0]), [], [list(group) for group in groups])


def _allocated(
    members: Sequence[Member], entries: Sequence[Entry | None], slots: int, capacity: int, device: Device
) -> Backbone:
    backbone = Backbone(members, slots, capacity, device)
    device.launch(backbone.stream, "allocate", backbone.allocate, entries)
    return backbone
