"""What a caller may ask of speculation, and the numbers by which the tuner decides (docs/speculation.md).

Speculation changes how fast a text comes, never the text.
"""

from __future__ import annotations

from dataclasses import dataclass

from genarm_fast.utils.checks import check_integer

MAX_K = 32


@dataclass(frozen=True, slots=True)
class Speculation:
    """Draft tokens with a cheap member or from the text itself, and verify several at once with the others.

    Args:
        drafter: who drafts: the name of a member that has a forward of its own (an ARM, or "base"; lanes of one
            forward draft together under any of their names), "ngram" (what followed the last few tokens when they
            came before, in the prompt or the output), or "draft_model". None: whichever pays best.
        k: drafts per step; 0 turns drafting off; None: as many as pay, by measured cost and acceptance.
        max_k: most drafts per step, if k is None.

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
        """Most drafts of a step."""
        return self.max_k if self.k is None else self.k


OFF = Speculation(k=0)


def as_speculation(value: object) -> Speculation:
    """A `Speculation` from "auto", "off" or a `Speculation`; raises ValueError for anything else."""
    if isinstance(value, Speculation):
        return value
    if not isinstance(value, str) or value not in ("auto", "off"):
        raise ValueError(f'speculation={value!r}: expected "auto", "off" or a Speculation')
    return Speculation() if value == "auto" else OFF


@dataclass(frozen=True, slots=True)
class TunerConfig:
    """The numbers by which a `Tuner` measures, predicts, switches and tries. Nobody has to change them."""

    # Timings kept for each size of a forward. Their lower quartile ignores the one in twenty that the machine held up.
    timings: int = 7
    # Drafts of steps that `warm_up` times. What is between is interpolated, more goes on from there.
    warm_drafts: tuple[int, ...] = (1, 4)
    # Rows after which evidence on acceptance counts half, since a text changes its kind within some 32 tokens.
    half_life: float = 32.0
    # The half-life of a second, short memory: 4 rows show a sudden change within a few steps.
    jump_half_life: float = 4.0
    # Where one size was measured, n tokens cost in proportion to 16 + n: reading the weights dominates few tokens.
    free_tokens: int = 16
    # Steps between two predictions, each of which takes 0.1 to 0.2 ms of the host; steps between do the same.
    update_interval: int = 4
    # Steps between shadow evaluations that take a draw: 0.4 % of a step with 32 rows, so 0.1 % of the time.
    shadow_interval: int = 4
    # A new choice needs at most this share of the old one's time, so that noise of 2 % does not switch back and forth.
    switch_margin: float = 0.98
    # The same to leave plain decoding: rows that get ahead by drafts end early and leave smaller, dearer batches.
    leave_plain_margin: float = 0.95
    # Share of the time that trials may lose: 1 % is what nobody notices.
    exploration: float = 0.01
    # Share of the time saved by drafts that trials may lose on top: whoever gains much can pay for finding more.
    exploration_of_savings: float = 0.02
    # Steps before a choice is tried again, at first and after a success.
    retry_steps: int = 16
    # Most steps before a drafter is tried again: each trial in vain doubles them, so a poor one has 6 in 1500 steps.
    max_retry_steps: int = 512


DEFAULT_TUNER_CONFIG = TunerConfig()
