"""A fixed number of places for rows: who sits where, and how much of each prompt the caches hold."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from genarm_fast.engine.sequence import Row

CHUNK_TOKENS = 512  # of all rows together, prefilled between two rounds
WORTH_COPYING = 8  # tokens


@dataclass(eq=False)
class Seat:
    """A row in its slot. prompts: as each running member sees it, without the last token, which is fed when decoding.

    done: so many tokens of each prompt are in the caches. donor: its slot will have the first `common` ones.
    drafted: so many tokens of the response, counting the last one of the prompt, are in the draft model's cache.
    """

    row: Row
    slot: int
    prompts: list[list[int]]
    done: int = 0
    donor: Seat | None = None
    common: int = 0
    drafted: int = 0

    @property
    def needed(self) -> int:
        return max(map(len, self.prompts))

    def shared(self, prompts: Sequence[Sequence[int]]) -> int:
        """Tokens that these prompts begin with like its own, for every member."""
        return min(common_prefix(mine, other) for mine, other in zip(self.prompts, prompts))


class Slots:
    """Seats waiting rows in order, and says what is to be prefilled or copied next."""

    def __init__(self, count: int, rows: Iterable[Row], members: Sequence[int]) -> None:
        self.members = members  # those that run, among all
        self.waiting = deque(rows)
        self.last: list[Seat | None] = [None] * count  # of each slot; its prompt stays there after its end
        self.prefilling: list[Seat] = []
        self.running: list[Seat] = []

    def __bool__(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running)

    def admit(self) -> None:
        """Seat waiting rows while slots are free. A beginning that any slot holds is not prefilled again."""
        busy = {seat.slot for seat in (*self.prefilling, *self.running)}
        free = [slot for slot in reversed(range(len(self.last))) if slot not in busy]
        while free and self.waiting:
            row = self.waiting.popleft()
            row.arrived = time.perf_counter()
            prompts = [row.request.token_ids[member][:-1] for member in self.members]
            donor = max(filter(None, self.last), key=lambda seat: seat.shared(prompts), default=None)
            common = donor.shared(prompts) if donor else 0
            if donor and common >= WORTH_COPYING and donor.slot in free:
                seat = Seat(row, donor.slot, prompts, done=common)
            elif donor and common >= WORTH_COPYING:
                seat = Seat(row, free[-1], prompts, donor=donor, common=common)
            else:
                seat = Seat(row, free[-1], prompts)
            free.remove(seat.slot)
            self.last[seat.slot] = seat
            self.prefilling.append(seat)

    def chunk(self) -> tuple[list[Seat], int]:
        """Seats to prefill next, all from the same position on, and how many tokens; ([], 0) if there are none."""
        ready = [seat for seat in self.prefilling if seat.donor is None and seat.done < seat.needed]
        ready = [seat for seat in ready if seat.done == ready[0].done]
        while ready:
            width = min(max(seat.needed - seat.done for seat in ready), CHUNK_TOKENS)
            fitting = max(1, CHUNK_TOKENS // width)
            if len(ready) <= fitting:
                return ready, width
            ready = ready[:fitting]
        return [], 0

    def copies(self) -> Iterator[tuple[Seat, Seat]]:
        """(donor, seat) of seats whose donor has what they share."""
        for seat in self.prefilling:
            if seat.donor is not None and seat.donor.done >= seat.common:
                yield seat.donor, seat
                seat.done, seat.donor = seat.common, None

    def start(self) -> None:
        """Let seats run whose prompts are in the caches."""
        now = time.perf_counter()
        for seat in self.prefilling:
            if seat.donor is None and seat.done >= seat.needed:
                seat.row.prefilled = now
                self.running.append(seat)
        self.prefilling = [seat for seat in self.prefilling if seat.donor is not None or seat.done < seat.needed]

    def leave(self, seats: Iterable[Seat]) -> None:
        """Free the slots of rows that ended. What a failed one left behind is not shared."""
        for seat in seats:
            self.running.remove(seat)
            if seat.row.error is not None:
                self.last[seat.slot] = None


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))
