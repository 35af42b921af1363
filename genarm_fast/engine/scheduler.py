"""Who is in which slot, whose prompt is prefilled next, and who takes part in the next step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any, NamedTuple

from genarm_fast.engine.sequence import Sequence

CHUNK_TOKENS = 512  # of all sequences together, prefilled between two steps
WORTH_COPYING = 8  # tokens
MOST_OVERTAKEN = 64  # sequences of higher priority that may come before one that waits, so that it does not starve


class Chunk(NamedTuple):
    """Sequences whose caches of these members get `width` tokens from position `start` on."""

    sequences: list[Sequence]
    members: list[int]
    start: int
    width: int


class Scheduler:
    """Gives slots to waiting sequences, first come first served, and keeps track of them until they leave.

    residents[slot]: the sequence whose prompt the slot's cache holds, also after its end: a later prompt that begins
    alike copies the beginning instead of computing it again.
    """

    def __init__(self) -> None:
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []
        self.residents: list[Sequence | None] = []
        self.timed: list[Sequence] = []  # those with a deadline: a step need not look through a long queue for them
        self._served = 0  # where `due` goes on if not all sequences fit into a step
        self._shortest = True  # whether the next chunk is of the shortest rest of a prompt

    def __bool__(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running)

    @property
    def placed(self) -> list[Sequence]:
        """Sequences that have a slot."""
        return [*self.prefilling, *self.running]

    @property
    def active(self) -> list[Sequence]:
        """Placed sequences that somebody waits for."""
        return [sequence for sequence in self.placed if not sequence.held]

    def enqueue(self, sequences: list[Sequence], *, again: bool = False) -> None:
        """Let sequences wait, those of a higher priority before others that were not overtaken too often.

        again: an earlier call was interrupted in the middle.
        """
        for sequence in sequences if again else ():
            for queue in (self.waiting, self.timed):
                while sequence in queue:
                    queue.remove(sequence)
        for sequence in sequences:
            place = len(self.waiting)
            while place and self._overtakes(sequence, self.waiting[place - 1]):
                place -= 1
                self.waiting[place].overtaken += 1
            self.waiting.insert(place, sequence)
            if sequence.deadline is not None:
                self.timed.append(sequence)

    def _overtakes(self, sequence: Sequence, other: Sequence) -> bool:
        higher = sequence.request.params.priority > other.request.params.priority
        return higher and other.overtaken < MOST_OVERTAKEN

    def expired(self) -> list[Sequence]:
        """Sequences whose time is over."""
        now = time.perf_counter() if self.timed else 0.0
        return [each for each in self.timed if each.late(now)]

    def free_slots(self) -> list[int]:
        """Slots without a sequence, the highest first."""
        busy = {sequence.slot for sequence in self.placed}
        return [slot for slot in reversed(range(len(self.residents))) if slot not in busy]

    def resize(self, slots: int) -> None:
        """There are so many slots now; what is in those that stay, stays."""
        self.residents = [*self.residents[:slots], *[None] * (slots - len(self.residents))]

    def forget_prompts(self) -> None:
        """Copy no prompt from a slot any more: weights may have changed since it was prefilled."""
        self.residents = [None] * len(self.residents)

    # Sequences join their next queue before they leave the last one: an interrupt in between must not lose them.

    def place(self, sequence: Sequence, members: int) -> None:
        """Give a waiting sequence a free slot; a beginning that any slot holds will not be prefilled again.

        Of all slots the one that shares most tokens is the donor. If it is free, the sequence takes it as it is. Else
        the tokens are copied from it: at once, or when the donor's own prefill has come that far (`copies`).
        """
        free = self.free_slots()
        sequence.admitted = time.perf_counter() if sequence.admitted is None else sequence.admitted
        sequence.slot, sequence.cached = free[-1], [0] * members
        sequence.donor, sequence.shared, sequence.donor_slot = None, 0, 0
        known = [(shared_tokens(each, sequence), slot) for slot, each in enumerate(self.residents) if each is not None]
        shared, slot = max(known, key=lambda pair: pair[0], default=(0, 0))
        if shared >= WORTH_COPYING:
            donor = self.residents[slot]
            assert donor is not None
            if slot in free:  # in place, nothing to copy
                sequence.slot = slot
                for m in sequence.needed:
                    sequence.cached[m] = min(shared, donor.cached[m])  # it may have left in mid-prefill
            else:
                sequence.donor, sequence.shared, sequence.donor_slot = donor, shared, slot
        self.residents[sequence.slot] = sequence
        self.prefilling.append(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)

    def next_chunk(self, most: int | None = None, factor: int = 1) -> Chunk | None:
        """What to prefill next, all of it from one position on; None if there is nothing.

        Chunks are in turn of the prompt with the fewest tokens left and of the one that came first. So a short prompt
        waits for one chunk of a long one, not for all, and short ones that keep coming take half of the chunks at most.

        most: tokens, of all sequences together. factor: of the usual number, which is never exceeded.
        """
        usual = factor * CHUNK_TOKENS
        most = usual if most is None else min(most, usual)
        ready = [(each, key) for each in self.prefilling if each.donor is None and (key := behind(each))[1]]
        if not ready:
            return None
        if self._shortest:
            ready.sort(key=lambda pair: left(*pair))
        self._shortest = not self._shortest
        start, members = ready[0][1]
        sequences = [each for each, key in ready if key == (start, members)]
        while True:
            width = min(max(left(each, (start, members)) for each in sequences), most)
            if len(sequences) <= max(1, most // width):
                return Chunk(sequences, members, start, width)
            sequences.pop()

    def copies(self) -> Iterator[tuple[int, Sequence]]:
        """(slot of the donor, sequence) of sequences whose donor holds all that they share by now."""
        for sequence in self.prefilling:
            donor = sequence.donor
            if donor is None:
                continue
            there = self.residents[sequence.donor_slot] is donor
            if there and all(donor.cached[m] >= sequence.shared for m in sequence.needed):
                yield sequence.donor_slot, sequence
                for m in sequence.needed:
                    sequence.cached[m] = sequence.shared
            elif there and donor in self.prefilling:
                continue  # still on its way
            sequence.donor = None  # it has left, say: the prompt is computed

    def start_ready(self) -> None:
        """Let sequences run whose prompts are in the caches of all members that they need."""
        now = time.perf_counter()
        for sequence in [*self.prefilling]:
            if sequence.donor is None and not behind(sequence)[1]:
                sequence.prefilled = now if sequence.prefilled is None else sequence.prefilled
                self.running.append(sequence)
                self.prefilling.remove(sequence)

    def catch_up(self, sequence: Sequence) -> None:
        """Prefill members that a sequence did not need before; what it shares with a donor was found without them."""
        sequence.donor = None
        if sequence in self.running and behind(sequence)[1]:
            if sequence not in self.prefilling:
                self.prefilling.append(sequence)
            self.running.remove(sequence)

    def due(self, most: int) -> list[Sequence]:
        """Running sequences for the next step, at most so many; those left out come first the next time."""
        ready = [sequence for sequence in self.running if not sequence.held]
        if len(ready) <= most:
            return ready
        start = self._served % len(ready)
        self._served += most
        return (ready[start:] + ready[:start])[:most]

    def preempt(self, sequence: Sequence) -> None:
        """Take a slot away; the sequence waits first in the queue, and its text so far is prefilled again later."""
        slot, sequence.unread = sequence.slot, 0
        sequence.epoch += 1  # what was launched, or drafted ahead, for the old slot counts no more
        self.waiting.appendleft(sequence)
        for queue in (self.prefilling, self.running):
            if sequence in queue:
                queue.remove(sequence)
        if slot >= 0:
            self.residents[slot] = None
        sequence.slot, sequence.donor = -1, None

    def leave(self, sequences: Iterable[Sequence], *, everywhere: bool = False) -> None:
        """Free the slots of sequences, in one look at each queue. What a failed one left behind is not shared.

        everywhere: they may be in two queues, since a step was cut short. Else those with a slot do not wait, so that
        the queue of those that do, however long, is not read.
        """
        leaving = {id(sequence): sequence for sequence in sequences}
        if not leaving:
            return
        if everywhere or any(each.slot < 0 for each in leaving.values()):
            self.waiting = deque(each for each in self.waiting if id(each) not in leaving)
        self.prefilling = [each for each in self.prefilling if id(each) not in leaving]
        self.running = [each for each in self.running if id(each) not in leaving]
        if self.timed:
            self.timed = [each for each in self.timed if id(each) not in leaving or not each.ended]
        for sequence in leaving.values():
            if sequence.error is not None and sequence.slot >= 0:
                self.residents[sequence.slot] = None
            sequence.slot, sequence.donor = -1, None


def behind(sequence: Sequence) -> tuple[int, list[int]]:
    """(position, members): the needed members whose caches lack most tokens before the last one, and from where on."""
    lacking = [m for m in sequence.needed if sequence.cached[m] < sequence.position(m)]
    start = min((sequence.cached[m] for m in lacking), default=0)
    return start, [m for m in lacking if sequence.cached[m] == start]


def left(sequence: Sequence, place: tuple[int, list[int]]) -> int:
    """Tokens of its prompt that these members lack from this position on (`behind`)."""
    start, members = place
    return max(sequence.position(m) for m in members) - start


def shared_tokens(donor: Sequence, sequence: Sequence) -> int:
    """Tokens with which both prompts begin, for every member that the second needs; 0 if the first lacks a member."""
    members = sequence.needed
    if not set(members) <= set(donor.needed):
        return 0
    prompts = ((donor.request.token_ids[m][:-1], sequence.request.token_ids[m][:-1]) for m in members)
    return min(common_prefix(mine, other) for mine, other in prompts)


def common_prefix(one: Any, other: Any) -> int:
    """Elements with which both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))
