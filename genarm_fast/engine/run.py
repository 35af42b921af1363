"""A thread's run of its sequences: it steps the engine for all sequences, or waits while another thread steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from genarm_fast.engine.sequence import Sequence
from genarm_fast.engine.turns import Turns


class Stepped(Protocol):
    """The part of an engine that a run uses."""

    turns: Turns

    def join(self, sequences: list[Sequence], news: Callable[[Sequence], None], *, stepwise: bool = False) -> None: ...

    def abort(self, sequences: list[Sequence]) -> None: ...

    def step_in_turn(self) -> list[Sequence]: ...


class Run:
    """Iterator over the news of one caller's sequences. Each item lists the sequences that have advanced.

    Closing the run takes unfinished sequences out of the engine, after a step that runs.
    """

    _closed = True  # `__del__` reads this value if `__init__` was interrupted: then nothing is in the engine yet

    def __init__(self, engine: Stepped, sequences: list[Sequence], stepwise: bool) -> None:
        self.engine, self.sequences = engine, sequences
        self._news: deque[Sequence] = deque()
        self._closed = False
        try:
            engine.join(sequences, self._news.append, stepwise=stepwise)
        except (TypeError, ValueError):  # the engine refused the sequences, so there is nothing to take out
            self._closed = True
            raise

    def __iter__(self) -> Run:
        return self

    def __next__(self) -> list[Sequence]:
        """Step until there are news, or wait while another thread steps. Raises any error that a step raises."""
        if not self._news:
            for sequence in self.sequences:
                sequence.held = False
        try:
            while not self._can_stop():
                with self.engine.turns.take(unless=self._can_stop) as taken:
                    if not taken or self._can_stop():
                        continue
                    # A step ends sequences before it tells the news. So only in this thread's turn, with no step under
                    # way, do ended sequences mean that no news will come.
                    if all(sequence.ended for sequence in self.sequences):
                        break
                    self.engine.step_in_turn()
        except BaseException:
            self.close()
            raise
        if not self._news:
            raise StopIteration
        return list(dict.fromkeys(self._news.popleft() for _ in range(len(self._news))))

    def _can_stop(self) -> bool:
        """Whether stepping can stop: there are news, or the run is closed."""
        return bool(self._news) or self._closed

    def close(self) -> None:
        """Take unfinished sequences out of the engine."""
        if not self._closed:
            self.engine.abort([sequence for sequence in self.sequences if not sequence.ended])
            self._closed = True  # set last, so that a close that was interrupted can be repeated

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
