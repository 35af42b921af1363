"""Sizes of the KV cache: as many slots as asked for, or fewer if a limit or the free memory is too small for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator


def rounded_capacity(capacity: int) -> int:
    """Return `capacity` raised to one of few sizes, by 63 or an eighth at most, so that longer requests fit too."""
    step = max(64, (1 << capacity.bit_length()) // 16)
    return -(-capacity // step) * step


def sizes_to_try(slots: int, least: int, capacity: int, fits: Callable[[int, int], bool]) -> Iterator[tuple[int, int]]:
    """Iterate over (slots, tokens of a slot) to try in turn while memory runs out.

    The first pair has longer slots than asked for, the second is exact, and later ones have fewer slots, down to
    `least`.

    fits(slots, tokens): whether caches of this size are allowed.
    """
    while slots > least and not fits(slots, capacity):
        slots -= 1
    if not fits(slots, capacity):
        return
    if fits(slots, rounded_capacity(capacity)) and rounded_capacity(capacity) > capacity:
        yield slots, rounded_capacity(capacity)
    yield slots, capacity
    while slots > least:
        slots = max(slots // 2, least)
        yield slots, capacity
