"""Draft policy of a run: the drafter that the caller asked for, or a tuner's choice.

Tuners outlive runs, and several threads use them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from threading import Lock
from typing import Any

from genarm_fast.speculation.config import Speculation
from genarm_fast.speculation.observations import PLAIN, Choice, ShadowObservation, StepObservation
from genarm_fast.speculation.tuner import Tuner


class Tuners:
    """The tuners of one model, which keep what they learnt from run to run. Runs may be in several threads."""

    def __init__(self) -> None:
        self.lock = Lock()  # one lock for all tuners, since each call takes microseconds
        self._tuners: dict[tuple[tuple[str, ...], int, bool], Tuner] = {}
        self._learns_costs_only = False

    def get(self, drafters: Sequence[str], max_k: int, ahead: bool) -> Tuner:
        """Return the tuner of these drafters, which the first call makes. Arguments as in `Tuner`."""
        key = tuple(drafters), max_k, ahead
        with self.lock:
            if key not in self._tuners:
                self._tuners[key] = Tuner(drafters, max_k, ahead=ahead)
                self._tuners[key].learns_costs_only = self._learns_costs_only
            return self._tuners[key]

    @contextmanager
    def learning_costs_alone(self) -> Iterator[None]:
        """Within the block, let tuners learn the times of steps but no acceptance, since the texts are made up."""
        self._set_learns_costs_only(True)
        try:
            yield
        finally:
            self._set_learns_costs_only(False)

    def _set_learns_costs_only(self, value: bool) -> None:
        with self.lock:
            self._learns_costs_only = value
            for tuner in self._tuners.values():
                tuner.learns_costs_only = value

    def stats(self) -> list[dict[str, Any]]:
        """Return `Tuner.stats` of each tuner, for JSON."""
        with self.lock:
            return [tuner.stats() for tuner in self._tuners.values()]


class DraftPolicy:
    """Chooses a drafter and K for each step of a run, and passes observations on to a tuner. Safe to use from threads.

    A drafter is known here by its index in `names`.

    Args:
        speculation: the caller's setting. With a k the policy is fixed; without one a tuner chooses.
        names: the names of each drafter; none for a drafter that can't draft now. If no drafter has the name that the
            caller chose, there are no drafts.
        tuners: the tuners of the model.
        ahead: whether members draft the next block while one is verified.

    usable_drafters: drafters that the policy may choose.
    """

    def __init__(self, speculation: Speculation, names: Sequence[Sequence[str]], tuners: Tuners, ahead: bool) -> None:
        name = speculation.drafter
        able = [i for i, own in enumerate(names) if own and (name is None or name in own)]
        self.usable_drafters = able if speculation.most else []
        self._k = speculation.k if self.usable_drafters else 0
        self.max_drafts = speculation.most
        self._lock = tuners.lock
        if self._k is None:
            self._tuner = tuners.get(["+".join(names[i]) for i in self.usable_drafters], speculation.max_k, ahead)

    def choose(self, rows: int) -> Choice:
        """Return the choice for the next step, which has `rows` sequences."""
        if self._k is not None:
            return Choice(self.usable_drafters[0], self._k) if self._k else PLAIN
        with self._lock:
            choice = self._tuner.choose(rows)
        return PLAIN if choice.drafter is None else Choice(self.usable_drafters[choice.drafter], choice.k)

    @property
    def tuner_candidates(self) -> list[int]:
        """Drafters among which a tuner chooses; none if the policy is fixed."""
        return self.usable_drafters if self._k is None else []

    def shadow_due(self) -> list[int]:
        """Return the candidates for which this step should draw a shadow draft."""
        if self._k is not None:
            return []
        with self._lock:
            return self.usable_drafters if self._tuner.shadow_due() else []

    def timing_due(self) -> bool:
        """Return the tuner's `timing_due`; False if the policy is fixed."""
        if self._k is not None:
            return False
        with self._lock:
            return self._tuner.timing_due()

    def observe_shadow(
        self,
        drafter: int,
        guesses: Sequence[Sequence[int]],
        generated: Sequence[Sequence[int]],
        seconds: float | None = None,
    ) -> None:
        """Learn from the drafts that a candidate would have made in a step in which it did not draft.

        Args:
            drafter: the candidate.
            guesses: token ids that it would have drafted, for each sequence.
            generated: token ids that the step generated, for each sequence; sequences without any do not count.
            seconds: as in `ShadowObservation`.
        """
        pairs = [list(zip(guess, tokens)) for guess, tokens in zip(guesses, generated) if tokens]
        accepted = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pair)) for pair in pairs]
        proposed = [len(pair) for pair in pairs]
        with self._lock:
            self._tuner.observe_shadow(
                ShadowObservation(self.usable_drafters.index(drafter), proposed, accepted, seconds)
            )

    def observe(self, observation: StepObservation) -> None:
        """Learn from a step. A fixed policy learns nothing."""
        if self._k is not None:
            return
        if observation.drafter is not None:
            observation = replace(observation, drafter=self.usable_drafters.index(observation.drafter))
        with self._lock:
            self._tuner.observe(observation)
