"""What a caller may say about speculation. It changes how fast a text comes, never the text (docs/speculation.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
        for name, value, low in (("k", self.k, 0), ("max_k", self.max_k, 1)):
            if name == "k" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}={value!r}: expected an integer in {low}..{MAX_K}")
            if not low <= value <= MAX_K:
                raise ValueError(f"{name}={value!r}: expected an integer in {low}..{MAX_K}")

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
    if value not in ("auto", "off"):
        raise ValueError(f'speculation={value!r}: expected "auto", "off" or a Speculation')
    return Speculation() if value == "auto" else OFF


class Fixed:
    """Always the same drafter and number of drafts."""

    def __init__(self, drafter: int | None, k: int) -> None:
        self.drafter, self.k = drafter, k

    def choose(self, rows: int) -> tuple[int | None, int]:
        return self.drafter, self.k

    def observe(self, *_: object) -> None:
        pass


def plan(speculation: Speculation, names: Sequence[Sequence[str]]) -> Fixed:
    """Who decides in each round. names: of each drafter there is; without the one that was asked for, nobody drafts."""
    fitting = [i for i, own in enumerate(names) if speculation.drafter is None or speculation.drafter in own]
    if not speculation.k or not fitting:
        return Fixed(None, 0)
    return Fixed(fitting[0], speculation.k)
