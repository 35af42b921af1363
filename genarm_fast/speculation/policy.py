"""Who drafts in a run: what the caller asked for, or what a tuner chooses. Tuners outlive runs and serve threads."""

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
        self.lock = Lock()  # of all tuners: they are called for microseconds
        self._tuners: dict[tuple[tuple[str, ...], int, bool], Tuner] = {}
        self._texts_mean_nothing = False

    def get(self, drafters: Sequence[str], max_k: int, ahead: bool) -> Tuner:
        """The tuner of these drafters; a new one the first time. Arguments as of `Tuner`."""
        key = tuple(drafters), max_k, ahead
        with self.lock:
            if key not in self._tuners:
                self._tuners[key] = Tuner(drafters, max_k, ahead=ahead)
                self._tuners[key].texts_mean_nothing = self._texts_mean_nothing
            return self._tuners[key]

    @contextmanager
    def learning_costs_alone(self) -> Iterator[None]:
        """Meanwhile steps are timed, and what they draft and accept is not counted: nobody asked for these texts."""
        self._set_texts_mean_nothing(True)
        try:
            yield
        finally:
            self._set_texts_mean_nothing(False)

    def _set_texts_mean_nothing(self, value: bool) -> None:
        with self.lock:
            self._texts_mean_nothing = value
            for tuner in self._tuners.values():
                tuner.texts_mean_nothing = value

    def stats(self) -> list[dict[str, Any]]:
        """`Tuner.stats` of each, for JSON."""
        with self.lock:
            return [tuner.stats() for tuner in self._tuners.values()]


class DraftPolicy:
    """Chooses a drafter and K for each step of a run, and passes on what steps showed. Safe to use from threads.

    Drafters are known here by their index in `names`.

    Args:
        speculation: what the caller asked for. With a k the policy is fixed; without, a tuner chooses.
        names: the names that each drafter answers to, none for one that can't draft now. If no drafter has the one that
            was asked for, nobody drafts.
        tuners: of the model.
        ahead: whether members draft the next block while one is verified.

    allowed: drafters that it may choose.
    """

    def __init__(self, speculation: Speculation, names: Sequence[Sequence[str]], tuners: Tuners, ahead: bool) -> None:
        name = speculation.drafter
        able = [i for i, own in enumerate(names) if own and (name is None or name in own)]
        self.allowed = able if speculation.most else []
        self._k = speculation.k if self.allowed else 0
        self.most = speculation.most
        self._lock = tuners.lock
        if self._k is None:
            self._tuner = tuners.get(["+".join(names[i]) for i in self.allowed], speculation.max_k, ahead)

    def choose(self, rows: int) -> Choice:
        """The choice for the next step, with this many sequences."""
        if self._k is not None:
            return Choice(self.allowed[0], self._k) if self._k else PLAIN
        with self._lock:
            choice = self._tuner.choose(rows)
        return PLAIN if choice.drafter is None else Choice(self.allowed[choice.drafter], choice.k)

    @property
    def candidates(self) -> list[int]:
        """Drafters among which a tuner chooses; none where the policy is fixed."""
        return self.allowed if self._k is None else []

    def shadow_due(self) -> list[int]:
        """Candidates whose shadow evaluation is worth a draw in this step."""
        if self._k is not None:
            return []
        with self._lock:
            return self.allowed if self._tuner.shadow_due() else []

    def timing_due(self) -> bool:
        """As of `Tuner`; False where the policy is fixed."""
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
        """Learn from what a candidate would have drafted in a step of another one, or of none.

        Args:
            drafter: whose guesses they are.
            guesses: token ids that it would have drafted, for each sequence.
            generated: token ids that the step generated, for each sequence; sequences without any tell nothing.
            seconds: as in `ShadowObservation`.
        """
        pairs = [list(zip(guess, tokens)) for guess, tokens in zip(guesses, generated) if tokens]
        accepted = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pair)) for pair in pairs]
        proposed = [len(pair) for pair in pairs]
        with self._lock:
            self._tuner.observe_shadow(ShadowObservation(self.allowed.index(drafter), proposed, accepted, seconds))

    def observe(self, observation: StepObservation) -> None:
        """Learn from a step; nothing where the policy is fixed."""
        if self._k is not None:
            return
        if observation.drafter is not None:
            observation = replace(observation, drafter=self.allowed.index(observation.drafter))
        with self._lock:
            self._tuner.observe(observation)
