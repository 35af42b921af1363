"""Settings of speculation for callers, and the numbers by which the tuner decides (docs/speculation.md).

Speculation changes how fast a text is decoded, never the text.
"""

from __future__ import annotations

from dataclasses import dataclass

from genarm_fast.utils.checks import check_integer

MAX_K = 32


@dataclass(frozen=True, slots=True)
class Speculation:
    """Setting of speculation: a cheap member or the text itself drafts tokens, and the others verify several at once.

    Args:
        drafter: name of the drafter. The name of an ARM, or "base", makes that member draft, with all members that
            share its forward; one forward must not hold all members. "ngram" proposes the tokens that followed the last
            few tokens earlier in the prompt or the output. "draft_model" is the draft model. None: the fastest one.
        k: drafts per step; 0 turns drafting off. None: the number that is fastest by measured cost and acceptance.
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
        """The most drafts of a step."""
        return self.max_k if self.k is None else self.k


OFF = Speculation(k=0)


def as_speculation(value: object) -> Speculation:
    """Return a `Speculation` for "auto", "off" or a `Speculation`. Raises ValueError for anything else."""
    if isinstance(value, Speculation):
        return value
    if not isinstance(value, str) or value not in ("auto", "off"):
        raise ValueError(f'speculation={value!r}: expected "auto", "off" or a Speculation')
    return Speculation() if value == "auto" else OFF


@dataclass(frozen=True, slots=True)
class TunerConfig:
    """The numbers by which a `Tuner` measures, predicts, switches and tries. Users need not change them."""

    # Timings kept for each size of a forward. Their lower quartile ignores the one in twenty that the machine delayed.
    timings: int = 7
    # Numbers of drafts in the steps that `warm_up` times. Numbers between are interpolated, larger ones extrapolated.
    warm_drafts: tuple[int, ...] = (1, 4)
    # Rows after which evidence on acceptance counts half, since a text changes its kind within some 32 tokens.
    half_life: float = 32.0
    # Half-life of a second, short memory: 4 rows show a sudden change within a few steps.
    jump_half_life: float = 4.0
    # If one size was measured, n tokens cost in proportion to 16 + n: reading the weights dominates few tokens.
    free_tokens: int = 16
    # Steps from one prediction to the next. One takes 0.1 to 0.2 ms of the host; the steps between repeat its choice.
    update_interval: int = 4
    # Steps between shadow evaluations that take a draw: 0.4 % of a step with 32 rows, so 0.1 % of the time.
    shadow_interval: int = 4
    # Most time of a new choice, as a share of the old one's, so that noise of 2 % does not switch back and forth.
    switch_margin: float = 0.98
    # The same share for leaving plain decoding. It is lower, because rows that get ahead by drafts end early and leave
    # smaller batches, whose tokens cost more.
    leave_plain_margin: float = 0.95
    # Share of the time that trials may lose; users do not notice 1 %.
    exploration: float = 0.01
    # Share of the time saved by drafts that trials may lose in addition: large savings can pay for more trials.
    exploration_of_savings: float = 0.02
    # Steps before a choice is tried again, at first and after a success.
    retry_steps: int = 16
    # Most steps before a drafter is tried again. Each failed trial doubles them, so a poor drafter has 6 in 1500 steps.
    max_retry_steps: int = 512


DEFAULT_TUNER_CONFIG = TunerConfig()
