"""What a caller may say about speculation. It changes how fast a text comes, never the text (docs/speculation.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from threading import Lock
from typing import Any

from genarm_fast.params import check_integer
from genarm_fast.speculation.tuner import Controller


@dataclass(frozen=True, slots=True)
class Speculation:
    """Draft tokens with a cheap member or from the text itself, and verify several at once with the others.

    Args:
        drafter: who drafts: the name of a member that has a forward of its own (an ARM, or "base"; lanes of one
            forward draft together under any of their names), "ngram" (what followed the last few tokens when they
            came before, in the prompt or the output), or "draft_model". None: whichever pays best.
        k: drafts per round; 0 turns drafting off; None: as many as pay, by measured cost and acceptance.
        max_k: most drafts per round, if k is None.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
    """

    drafter: str | None = None
    k: int | None = None
    max_k: int = 8

    def __post_init__(self) -> None:
        if self.drafter is not None and not isinstance(self.drafter, str):
            raise TypeError(f"drafter={self.drafter!r}: expected a name or None")
        if self.k is not None:
            object.__setattr__(
                self, "k", check_integer("k", self.k, f"None or an integer in 0..{MAX_K}", 0, high=MAX_K)
            )
        max_k = check_integer("max_k", self.max_k, f"an integer in 1..{MAX_K}", 1, high=MAX_K)
        object.__setattr__(self, "max_k", max_k)

    @property
    def most(self) -> int:
        """Most drafts of a round."""
        return self.max_k if self.k is None else self.k


MAX_K = 32
OFF = Speculation(k=0)


def as_speculation(value: object) -> Speculation:
    """From "auto", "off" or a `Speculation`."""
    if isinstance(value, Speculation):
        return value
    if not isinstance(value, str) or value not in ("auto", "off"):
        raise ValueError(f'speculation={value!r}: expected "auto", "off" or a Speculation')
    return Speculation() if value == "auto" else OFF


class Controllers:
    """What a model has learnt about speculation, for all its runs, which may be in several threads."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.known: dict[tuple[tuple[str, ...], int, bool], Controller] = {}

    def of(self, drafters: Sequence[str], max_k: int, ahead: bool) -> Controller:
        key = tuple(drafters), max_k, ahead
        with self.lock:
            return self.known.setdefault(key, Controller(drafters, max_k, ahead=ahead))

    def stats(self) -> list[dict[str, Any]]:
        with self.lock:
            return [controller.stats() for controller in self.known.values()]


class Plan:
    """Who drafts how much in each round: what was asked for or, without a k, what the controller chooses.

    names: of each drafter there is. Without the one that was asked for, nobody drafts. ahead: whether members draft the
    next block while one is verified.
    """

    def __init__(
        self, speculation: Speculation, names: Sequence[Sequence[str]], controllers: Controllers, ahead: bool
    ) -> None:
        name = speculation.drafter
        self.fitting = [i for i, own in enumerate(names) if name is None or name in own]
        self.k = speculation.k if self.fitting else 0
        self.lock = controllers.lock
        if self.k is None:
            self.controller = controllers.of(["+".join(names[i]) for i in self.fitting], speculation.max_k, ahead)

    def choose(self, rows: int) -> tuple[int | None, int]:
        """Index of a drafter, and how many drafts; (None, 0) for none."""
        if self.k is not None:
            return (self.fitting[0], self.k) if self.k else (None, 0)
        with self.lock:
            choice, k = self.controller.choose(rows)
        return (None, 0) if choice is None else (self.fitting[choice], k)

    @property
    def adaptive(self) -> list[int]:
        """Drafters between which the controller chooses."""
        return self.fitting if self.k is None else []

    def curious(self) -> list[int]:
        """Drafters that a draw would tell something about now."""
        if self.k is not None:
            return []
        with self.lock:
            return self.fitting if self.controller.curious() else []

    def watch(
        self,
        drafter: int,
        guesses: Sequence[Sequence[int]],
        settled: Sequence[Sequence[int]],
        seconds: float | None = None,
    ) -> None:
        """Let the controller know what a drafter whose turn it was not guessed of the tokens that were settled."""
        pairs = [list(zip(guess, tokens)) for guess, tokens in zip(guesses, settled) if tokens]
        right = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pair)) for pair in pairs]
        with self.lock:
            self.controller.watch(self.fitting.index(drafter), [len(pair) for pair in pairs], right, seconds)

    def observe(self, drafter: int | None, *seen: Any) -> None:
        """As `Controller.observe`."""
        if self.k is None:
            with self.lock:
                self.controller.observe(None if drafter is None else self.fitting.index(drafter), *seen)
