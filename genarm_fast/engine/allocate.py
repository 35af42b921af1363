"""How large the KV cache is: as many slots as asked for, unless that is more memory than allowed, or than there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator


def roomy(capacity: int) -> int:
    """Tokens of a slot, raised to one of few numbers: by 63 or an eighth at most, so that longer requests fit too."""
    step = max(64, (1 << capacity.bit_length()) // 16)
    return -(-capacity // step) * step


def sizes(slots: int, least: int, capacity: int, fits: Callable[[int, int], bool]) -> Iterator[tuple[int, int]]:
    """(slots, tokens of a slot) to try one after the other, while memory runs out: first generous, then exact, then
    fewer slots, down to `least`.

    fits(slots, tokens): whether that much memory is allowed.
    """
    while slots > least and not fits(slots, capacity):
        slots -= 1
    if not fits(slots, capacity):
        return
    if fits(slots, roomy(capacity)) and roomy(capacity) > capacity:
        yield slots, roomy(capacity)
    yield slots, capacity
    while slots > least:
        slots = max(slots // 2, least)
        yield slots, capacity
