"""Prompt lookup, compared with a search of the whole text."""

from __future__ import annotations

import random

import pytest

from genarm_fast.speculation.ngram_drafter import NgramIndex


def search(tokens: list[int], k: int, max_n: int, min_n: int) -> list[int]:
    """Extend the text one token at a time after the latest earlier occurrence of its longest ending; return k
    tokens."""
    for n in range(min(max_n, len(tokens)), min_n - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                longer = list(tokens)
                for i in range(k):
                    longer.append(longer[start + n + i])
                return longer[len(tokens) :]
    return []


@pytest.mark.parametrize("seed", range(20))
def test_the_same_as_searching_everything(seed: int) -> None:
    draw = random.Random(seed)
    max_n = draw.randint(1, 5)
    min_n = draw.randint(1, max_n)
    index = NgramIndex(max_n=max_n, min_n=min_n)
    tokens: list[int] = []
    found = 0
    for _ in range(60):
        more = [draw.randrange(3 + seed % 5) for _ in range(draw.randint(1, 4))]
        tokens += more
        index.extend(more)
        k = draw.randint(0, 9)
        assert index.propose(k) == search(tokens, k, max_n, min_n)
        found += bool(index.propose(1))
    assert found > 5


def test_the_longest_ending_and_the_latest_occurrence_win() -> None:
    assert NgramIndex([1, 2, 3, 9, 2, 3, 8, 1, 2, 3]).propose(2) == [9, 2]
    assert NgramIndex([2, 3, 9, 2, 3, 8, 5, 2, 3]).propose(2) == [8, 5]


def test_a_repetition_goes_on_beyond_the_end() -> None:
    assert NgramIndex([7, 4, 5, 4, 5]).propose(5) == [4, 5, 4, 5, 4]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3, 4], [1, 2, 9, 2]])
def test_nothing_fits(tokens: list[int]) -> None:
    assert NgramIndex(tokens).propose(4) == []


@pytest.mark.parametrize(("max_n", "min_n"), [(2, 3), (2, 0)])
def test_lengths_are_checked(max_n: int, min_n: int) -> None:
    with pytest.raises(ValueError, match=f"min_n={min_n}, max_n={max_n}"):
        NgramIndex(max_n=max_n, min_n=min_n)
