"""How many slots there are: as many as asked for, unless their caches take more memory than allowed, or than there is.

Slots are alike, so the longest request sets what each of them takes. One without room even alone fails alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from .attention import Entry
from .backbone import Backbone
from .device import Device, out_of_memory
from .members import Member
from .requests import Row
from .selfcheck import entries_of


def make_room(
    groups: Sequence[Sequence[Member]],
    rows: Sequence[Row],
    needs: Sequence[int],
    slots: int,
    cache_bytes: int | None,
    device: Device,
) -> list[Backbone]:
    """A backbone with its caches for each group of members, with at most so many slots; [] if no row fits.

    needs: tokens of each row. Rows that do not fit get their `error` set.
    """
    entries = [entries_of(members) for members in groups]
    token = sum(
        len(group) * entry.bytes for group, layers in zip(groups, entries) for entry in layers if entry is not None
    )
    if cache_bytes is not None:
        for row, need in zip(rows, needs):
            if need * token > cache_bytes:
                row.error = MemoryError(
                    f"{need} tokens take {need * token:,} bytes of cache: expected at most cache_bytes={cache_bytes:,}"
                )
    while fitting := [(row, need) for row, need in zip(rows, needs) if row.error is None]:
        capacity = max(need for _, need in fitting)
        count = min(slots, len(fitting))
        if cache_bytes is not None:
            count = min(count, cache_bytes // (capacity * token))
        while count:
            try:
                return [_allocated(*each, count, capacity, device) for each in zip(groups, entries)]
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # whose frames hold caches
            count //= 2
        for row, need in fitting:
            if need == capacity:
                row.error = MemoryError(f"{need} tokens take {need * token:,} bytes of cache: out of memory")
                row.error.__cause__ = failure
    return []


def _allocated(
    members: Sequence[Member], entries: Sequence[Entry | None], slots: int, capacity: int, device: Device
) -> Backbone:
    backbone = Backbone(members, slots, capacity, device)
    device.launch(backbone.stream, "allocate", backbone.allocate, entries)
    return backbone
