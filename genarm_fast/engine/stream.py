"""Requests as they are generated, with weights that may change on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from genarm_fast.engine.sequence import Row, output_of
from genarm_fast.errors import GenerationError
from genarm_fast.outputs import GenerationOutput
from genarm_fast.params import check_weights

if TYPE_CHECKING:
    from genarm_fast.api import GenARM


@dataclass(slots=True)
class StreamChunk:
    """What one round added to one request. text: may be empty while a character or a possible stop string is open.

    token_ids: the tokens settled in this round, more than one where drafts were right. weights: the ARM weights that
    each of them was drawn with. index: of the prompt. finish_reason: None before the end.
    """

    text: str
    token_ids: list[int]
    weights: list[tuple[float, ...]]
    index: int = 0
    finish_reason: str | None = None


class Stream:
    """Iterator over `StreamChunk`s; a request's texts joined are its output's text. Made by `GenARM.stream`.

    Leaving it (`close`, or the end of a `with` block) frees its caches, or leaves them to the next call, at once.
    """

    def __init__(self, model: GenARM, rows: Sequence[Row], rounds: Iterator[list[Row]]) -> None:
        self._model = model
        self._rows = list(rows)
        self._rounds: Any = rounds
        self._chunks: deque[StreamChunk] = deque()
        self._shown = [(0, 0)] * len(self._rows)  # characters and tokens
        self._weights: dict[int, tuple[float, ...]] = {}  # set since the last round, by row
        self._closed = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StreamChunk:
        """Raises GenerationError once all others ended if requests failed, with what there is in its outputs."""
        while not self._chunks:
            while self._weights:  # between rounds: all of a round's drafts and targets are drawn with the same
                index, weights = self._weights.popitem()
                self._rows[index].weights = weights
            try:
                advanced = next(self._rounds)
            except StopIteration:
                failed = [] if self._closed else [row for row in self._rows if row.error is not None]
                self.close()
                if failed:
                    message = "; ".join(f"prompts[{row.request.index}]: {row.error}" for row in failed)
                    raise GenerationError(message, list(self.outputs)) from failed[0].error
                raise
            for row in advanced:
                index = row.request.index
                characters, tokens = self._shown[index]
                self._shown[index] = len(row.text), len(row.tokens)
                if row.error is None:
                    news = row.text[characters:], row.tokens[tokens:], row.used_weights[tokens:]
                    self._chunks.append(StreamChunk(*news, index, row.finish_reason))
            if self._closed:  # during the round
                self._rounds.close()
        return self._chunks.popleft()

    def set_weights(self, weights: float | Sequence[float], index: int | None = None) -> None:
        """Use other ARM weights from the next round on, for one prompt or for all of them; from any thread.

        Raises:
            ValueError, TypeError: not one finite number per ARM (or one for all).
            IndexError: no such prompt.
        """
        expanded = self._model.expand_weights(check_weights(weights, len(self._model.arms)))
        count = len(self._rows)
        if index is not None and not 0 <= index < count:
            raise IndexError(f"index={index}: expected 0..{count - 1}, one of the prompts")
        self._weights |= dict.fromkeys(range(count) if index is None else [index], expanded)

    @property
    def outputs(self) -> list[GenerationOutput]:
        """The whole output of every prompt.

        Raises:
            RuntimeError: before the end. After `close` in mid-generation, finish_reason is "cancelled".
        """
        if not self._closed and not all(row.ended for row in self._rows):
            raise RuntimeError("output: expected the stream to be at its end, or closed")
        return [output_of([row], self._model.arm_names) for row in self._rows]

    @property
    def output(self) -> GenerationOutput:
        """The output of the first prompt. Raises as `outputs`."""
        return self.outputs[0]

    def close(self) -> None:
        """Stop here, in mid-generation too, and let go of the caches. In mid-round (from another thread, or a logits
        processor): when that ends."""
        self._closed = True
        if not self._rounds.gi_running:
            self._rounds.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
