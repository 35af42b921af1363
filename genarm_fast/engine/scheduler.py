"""The scheduler: which sequence has which slot, which prompts are prefilled next, and which sequences a step has."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any, NamedTuple

from genarm_fast.engine.sequence import Sequence

CHUNK_TOKENS = 512  # tokens of all sequences together that are prefilled between two steps
MIN_COPIED_TOKENS = 8  # fewest shared tokens that are copied from another slot; fewer are computed again
MAX_OVERTAKEN = 64  # most sequences of higher priority that may overtake a waiting one, so that it does not starve


class Chunk(NamedTuple):
    """A piece of prefill: these members' caches get `width` tokens of these sequences from position `start` on."""

    sequences: list[Sequence]
    members: list[int]
    start: int
    width: int


class Scheduler:
    """Gives slots to waiting sequences, in the order of priority and arrival, and tracks them until they leave.

    residents[slot]: the sequence whose prompt the slot's cache holds, also after its end. A later prompt that begins
    with the same tokens copies them instead of computing them again.
    """

    def __init__(self) -> None:
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []
        self.residents: list[Sequence | None] = []
        self.with_deadline: list[Sequence] = []  # listed apart, so that a step need not search a long queue
        self._next_due = 0  # index at which `due` goes on if a step can't take all sequences
        # Whether the next chunk goes to the prompt with the fewest tokens left; else it goes to the oldest prompt.
        self._shortest_first = True

    def __bool__(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running)

    @property
    def placed(self) -> list[Sequence]:
        """Sequences that have a slot."""
        return [*self.prefilling, *self.running]

    @property
    def active(self) -> list[Sequence]:
        """Placed sequences whose reader waits for the next step."""
        return [sequence for sequence in self.placed if not sequence.held]

    def enqueue(self, sequences: list[Sequence], *, again: bool = False) -> None:
        """Put sequences into the queue, before those of lower priority that were overtaken fewer than 64 times.

        again: whether an earlier call with these sequences was interrupted, so that some may be in the queue already.
        """
        for sequence in sequences if again else ():
            for queue in (self.waiting, self.with_deadline):
                while sequence in queue:
                    queue.remove(sequence)
        for sequence in sequences:
            index = len(self.waiting)
            while index and self._overtakes(sequence, self.waiting[index - 1]):
                index -= 1
                self.waiting[index].overtaken += 1
            self.waiting.insert(index, sequence)
            if sequence.deadline is not None:
                self.with_deadline.append(sequence)

    def _overtakes(self, sequence: Sequence, other: Sequence) -> bool:
        higher = sequence.request.params.priority > other.request.params.priority
        return higher and other.overtaken < MAX_OVERTAKEN

    def expired(self) -> list[Sequence]:
        """Return the sequences whose time is over."""
        now = time.perf_counter() if self.with_deadline else 0.0
        return [each for each in self.with_deadline if each.is_late(now)]

    def free_slots(self) -> list[int]:
        """Return the slots without a sequence, the highest first."""
        busy = {sequence.slot for sequence in self.placed}
        return [slot for slot in reversed(range(len(self.residents))) if slot not in busy]

    def resize(self, slots: int) -> None:
        """Set the number of slots. Slots that remain keep their residents."""
        self.residents = [*self.residents[:slots], *[None] * (slots - len(self.residents))]

    def forget_prompts(self) -> None:
        """Forget which prompts the slots hold, so that none is copied; weights may have changed since the prefill."""
        self.residents = [None] * len(self.residents)

    # Sequences join their next queue before they leave the last one: an interrupt in between must not lose them.

    def place(self, sequence: Sequence, members: int) -> None:
        """Give a waiting sequence a free slot. Tokens that it shares with another slot's prompt are not computed again.

        The slot that shares most tokens is the donor. If that slot is free, the sequence takes it. Else the tokens are
        copied from it, once the donor's own prefill has reached their end (`copies`).
        """
        free = self.free_slots()
        sequence.admitted = time.perf_counter() if sequence.admitted is None else sequence.admitted
        sequence.slot, sequence.cached = free[-1], [0] * members
        sequence.donor, sequence.shared, sequence.donor_slot = None, 0, 0
        known = [(shared_tokens(each, sequence), slot) for slot, each in enumerate(self.residents) if each is not None]
        shared, slot = max(known, key=lambda pair: pair[0], default=(0, 0))
        if shared >= MIN_COPIED_TOKENS:
            donor = self.residents[slot]
            assert donor is not None
            if slot in free:  # the shared tokens are in place, so nothing is copied
                sequence.slot = slot
                for m in sequence.needed:
                    sequence.cached[m] = min(shared, donor.cached[m])  # the donor may have left in mid-prefill
            else:
                sequence.donor, sequence.shared, sequence.donor_slot = donor, shared, slot
        self.residents[sequence.slot] = sequence
        self.prefilling.append(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)

    def next_chunk(self, max_tokens: int | None = None, factor: int = 1) -> Chunk | None:
        """Return the next chunk to prefill, whose sequences all begin at one position; None if there is none.

        Chunks go by turns to the prompt with the fewest tokens left and to the oldest prompt. So a short prompt waits
        for one chunk of a long prompt, not for all of it. Short prompts that keep coming take at most half the chunks.

        max_tokens: most tokens, of all sequences together. factor: a chunk has CHUNK_TOKENS times this at most.
        """
        usual = factor * CHUNK_TOKENS
        max_tokens = usual if max_tokens is None else min(max_tokens, usual)
        ready = [(each, key) for each in self.prefilling if each.donor is None and (key := next_prefill(each))[1]]
        if not ready:
            return None
        if self._shortest_first:
            ready.sort(key=lambda pair: prefill_tokens(*pair))
        self._shortest_first = not self._shortest_first
        start, members = ready[0][1]
        sequences = [each for each, key in ready if key == (start, members)]
        while True:
            width = min(max(prefill_tokens(each, (start, members)) for each in sequences), max_tokens)
            if len(sequences) <= max(1, max_tokens // width):
                return Chunk(sequences, members, start, width)
            sequences.pop()

    def copies(self) -> Iterator[tuple[int, Sequence]]:
        """Iterate over (slot of the donor, sequence), for sequences whose donor holds all shared tokens by now."""
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
                continue  # the donor's prefill has not reached the end of the shared tokens yet
            sequence.donor = None  # the tokens were copied, or the donor is gone and the prompt is computed

    def start_ready(self) -> None:
        """Let sequences run whose prompts are in the caches of all members that they need, except the last token."""
        now = time.perf_counter()
        for sequence in [*self.prefilling]:
            if sequence.donor is None and not next_prefill(sequence)[1]:
                sequence.prefilled = now if sequence.prefilled is None else sequence.prefilled
                self.running.append(sequence)
                self.prefilling.remove(sequence)

    def catch_up(self, sequence: Sequence) -> None:
        """Prefill members that a sequence needs since its weights changed.

        It copies nothing from its donor any more, since the shared tokens were found for the earlier members.
        """
        sequence.donor = None
        if sequence in self.running and next_prefill(sequence)[1]:
            if sequence not in self.prefilling:
                self.prefilling.append(sequence)
            self.running.remove(sequence)

    def due(self, max_sequences: int) -> list[Sequence]:
        """Return the running sequences of the next step, `max_sequences` at most. The others come first next time."""
        ready = [sequence for sequence in self.running if not sequence.held]
        if len(ready) <= max_sequences:
            return ready
        start = self._next_due % len(ready)
        self._next_due += max_sequences
        return (ready[start:] + ready[:start])[:max_sequences]

    def preempt(self, sequence: Sequence) -> None:
        """Take a sequence's slot away. It waits first in the queue; its prompt and text are prefilled again later."""
        slot, sequence.unread = sequence.slot, 0
        sequence.epoch += 1  # tokens that were launched or drafted for the old slot no longer count
        self.waiting.appendleft(sequence)
        for queue in (self.prefilling, self.running):
            if sequence in queue:
                queue.remove(sequence)
        if slot >= 0:
            self.residents[slot] = None
        sequence.slot, sequence.donor = -1, None

    def leave(self, sequences: Iterable[Sequence], *, everywhere: bool = False) -> None:
        """Free the slots of sequences, in one pass over each queue. The cache of a failed sequence is not shared.

        everywhere: whether a sequence may be in two queues, since a step was cut short. Otherwise sequences with a slot
        are never in `waiting`. So this queue, which may be long, is not read for them.
        """
        leaving = {id(sequence): sequence for sequence in sequences}
        if not leaving:
            return
        if everywhere or any(each.slot < 0 for each in leaving.values()):
            self.waiting = deque(each for each in self.waiting if id(each) not in leaving)
        self.prefilling = [each for each in self.prefilling if id(each) not in leaving]
        self.running = [each for each in self.running if id(each) not in leaving]
        if self.with_deadline:
            self.with_deadline = [each for each in self.with_deadline if id(each) not in leaving or not each.ended]
        for sequence in leaving.values():
            if sequence.error is not None and sequence.slot >= 0:
                self.residents[sequence.slot] = None
            sequence.slot, sequence.donor = -1, None


def next_prefill(sequence: Sequence) -> tuple[int, list[int]]:
    """Return (position, members): the needed members whose caches lack most tokens, and the first token they lack.

    No cache needs the last token, which the next step feeds. Without lacking members the result is (0, []).
    """
    lacking = [m for m in sequence.needed if sequence.cached[m] < sequence.position(m)]
    start = min((sequence.cached[m] for m in lacking), default=0)
    return start, [m for m in lacking if sequence.cached[m] == start]


def prefill_tokens(sequence: Sequence, start: tuple[int, list[int]]) -> int:
    """Return how many tokens of a sequence a prefill has to write. start: position and members from `next_prefill`."""
    position, members = start
    return max(sequence.position(m) for m in members) - position


def shared_tokens(donor: Sequence, sequence: Sequence) -> int:
    """Return the number of tokens with which both prompts begin, for every member that `sequence` needs.

    It is 0 if the donor does not need one of these members. The last token of a prompt does not count.
    """
    members = sequence.needed
    if not set(members) <= set(donor.needed):
        return 0
    prompts = ((donor.request.token_ids[m][:-1], sequence.request.token_ids[m][:-1]) for m in members)
    return min(common_prefix(mine, other) for mine, other in prompts)


def common_prefix(one: Any, other: Any) -> int:
    """Return the number of elements with which both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))
