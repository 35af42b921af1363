"""Choices of the tuner before a step, and observations that it gets after the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Choice(NamedTuple):
    """The drafter of a step, as an index of the drafters, and its drafts per sequence; (None, 0) for no drafts."""

    drafter: int | None
    k: int


PLAIN = Choice(None, 0)  # plain decoding: one token per step and sequence


@dataclass(frozen=True, slots=True)
class StepObservation:
    """Observation of one step: its drafts, the accepted ones, and its times.

    Args:
        drafter, k: the choice for the step; None and 0 for plain decoding.
        rows: number of sequences that the step advanced.
        proposed: number of drafts of each sequence, at most k. If all are 0, the step shows the cost of plain decoding.
        accepted: number of right drafts of each sequence.
        draft_seconds: time of the drafter's forwards, the one for a bonus token included. None: the step was one
            launch, in which every sequence has k drafts and parts are not timed.
        verify_seconds: time of the rest of the step, or of the whole step if `draft_seconds` is None.
        drafter_steps: forwards of the drafter in `draft_seconds`. None: as many as the sequence with most drafts has,
            and one more if all drafts of a sequence were right.
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
        """Time of the whole step."""
        return (self.draft_seconds or 0.0) + self.verify_seconds


@dataclass(frozen=True, slots=True)
class ShadowObservation:
    """Observation of a drafter that did not draft in a step: the drafts that it would have made, and the right ones.

    Args:
        drafter: index of the drafter that was evaluated.
        proposed: number of each sequence's drafts that can be judged, at most the tokens that the step gave it.
        accepted: number of right drafts of each sequence.
        seconds: time of one draft for all sequences, including the forward that the step ran anyway. None: not
            measured.
    """

    drafter: int
    proposed: Sequence[int]
    accepted: Sequence[int]
    seconds: float | None = None
