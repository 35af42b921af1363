"""Preferences that a tiny model can learn."""

from __future__ import annotations

import random
from typing import Any

WORDS = ["cat", "dog", "sea", "man", "home", "mat", "place", "sun"]


def toy_rows(n: int, *, shuffled: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """Return n pairs: the chosen response starts with "the", the rejected one with "and"; the rest is random words.

    shuffled: choose at random instead, so that there is nothing to learn.
    """
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        tails = [" ".join(rng.choices(WORDS, k=2)) for _ in range(2)]
        sides = [f"the {tails[0]}", f"and {tails[1]}"]
        if shuffled and rng.random() < 0.5:
            sides.reverse()
        rows.append({"prompt": f"{i} {rng.choice(WORDS)}:", "chosen": sides[0], "rejected": sides[1]})
    return rows
