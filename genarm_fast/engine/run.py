"""What a thread that decodes some sequences does: it steps for all, or waits while another thread steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from genarm_fast.engine.sequence import Sequence
from genarm_fast.engine.turns import Turns


class Stepped(Protocol):
    """What it needs of an engine."""

    turns: Turns

    def join(self, sequences: list[Sequence], news: Callable[[Sequence], None], *, stepwise: bool = False) -> None: ...

    def abort(self, sequences: list[Sequence]) -> None: ...

    def step_in_turn(self) -> list[Sequence]: ...


class Run:
    """Iterator over the news of one caller's sequences: each item lists those that a step advanced.

    Closing it takes unfinished sequences out of the engine, in mid-step after the step.
    """

    _closed = True  # for `__del__` of one whose `__init__` was interrupted: nothing is in the engine yet

    def __init__(self, engine: Stepped, sequences: list[Sequence], stepwise: bool) -> None:
        self.engine, self.sequences = engine, sequences
        self._news: deque[Sequence] = deque()
        self._closed = False
        try:
            engine.join(sequences, self._news.append, stepwise=stepwise)
        except (TypeError, ValueError):  # they are none of its own: there is nothing to take out
            self._closed = True
            raise

    def __iter__(self) -> Run:
        return self

    def __next__(self) -> list[Sequence]:
        """Step until there are news, or wait for them while another thread steps. Raises what a step raises."""
        if not self._news:
            for sequence in self.sequences:
                sequence.held = False
        try:
            while not self._over():
                with self.engine.turns.take(unless=self._over) as taken:
                    if not taken or self._over():
                        continue
                    # Only in our turn does that mean that there will be no news: a step ends sequences, then tells.
                    if all(sequence.ended for sequence in self.sequences):
                        break
                    self.engine.step_in_turn()
        except BaseException:
            self.close()
            raise
        if not self._news:
            raise StopIteration
        return list(dict.fromkeys(self._news.popleft() for _ in range(len(self._news))))

    def _over(self) -> bool:
        """Whether there is something to tell, or nobody to tell it."""
        return bool(self._news) or self._closed

    def close(self) -> None:
        """Take unfinished sequences out of the engine."""
        if not self._closed:
            self.engine.abort([sequence for sequence in self.sequences if not sequence.ended])
            self._closed = True  # only now: interrupted before, it can be closed again

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
