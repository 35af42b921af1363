"""What the tuner says before a step, and what it is told afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Choice(NamedTuple):
    """Who drafts in a step, as an index of the drafters, and how many tokens a sequence; (None, 0) for nobody."""

    drafter: int | None
    k: int


PLAIN = Choice(None, 0)  # plain decoding: one token a step and sequence


@dataclass(frozen=True, slots=True)
class StepObservation:
    """What one step proposed, accepted and cost.

    Args:
        drafter, k: as chosen for the step; None and 0 for plain decoding.
        rows: sequences that the step advanced.
        proposed: drafts of each sequence, at most k. If no sequence has any, the step tells the cost of plain decoding.
        accepted: how many of these drafts were right, for each sequence.
        draft_seconds: time in the drafter, also where it runs once more because all drafts of a sequence were right.
            None: the step was one launch, in which every sequence has k drafts, and its parts have no times.
        verify_seconds: time in everything else.
        drafter_steps: forwards of the drafter in `draft_seconds`. None: one for each draft of the sequence with
            most, and one more where all of them were right.
    """

    drafter: int | None
    rows: int
    k: int
    proposed: Sequence[int]
    accepted: Sequence[int]
    draft_seconds: float | None
    verify_seconds: float
    drafter_steps: int | None = None

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return (self.draft_seconds or 0.0) + self.verify_seconds


@dataclass(frozen=True, slots=True)
class ShadowObservation:
    """What a drafter would have been worth in a step in which another one drafted, or nobody.

    Args:
        drafter: whose drafts were evaluated.
        proposed: drafts of each sequence that can be judged: no more than tokens were generated for the sequence.
        accepted: how many of these drafts were right, for each sequence.
        seconds: time of one draft for all sequences, with the forward that the step needed anyway; None: not measured.
    """

    drafter: int
    proposed: Sequence[int]
    accepted: Sequence[int]
    seconds: float | None = None
