"""One request, token by token, with weights that may change on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .errors import GenerationError
from .outputs import GenerationOutput
from .params import check_weights
from .requests import Row

if TYPE_CHECKING:
    from .api import GenARM


@dataclass(slots=True)
class StreamChunk:
    """What one round added. text: may be empty while a character or a possible stop string is unfinished.

    token_ids: the tokens settled in this round. weights: the ARM weights that each of them was drawn with.
    """

    text: str
    token_ids: list[int]
    weights: list[tuple[float, ...]]


class Stream:
    """Iterator over `StreamChunk`s; their texts joined are the output's text. Made by `GenARM.stream`.

    Leaving it (`close`, or the end of a `with` block) frees the caches at once, in mid-generation too.
    """

    def __init__(self, model: GenARM, row: Row, rounds: Iterator[list[Row]]) -> None:
        self._model = model
        self._row = row
        self._rounds: Any = rounds
        self._closed = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StreamChunk:
        """Raises GenerationError if the request failed, with what was generated before in its outputs."""
        row = self._row
        text, settled = len(row.text), len(row.tokens)
        try:
            next(self._rounds)
        except StopIteration:
            self._closed = True
            raise
        if row.error is not None:
            self.close()
            raise GenerationError(f"prompts[0]: {row.error}", [self.output]) from row.error
        return StreamChunk(row.text[text:], row.tokens[settled:], row.used_weights[settled:])

    def set_weights(self, weights: float | Sequence[float]) -> None:
        """Use other ARM weights from the next token on.

        Raises:
            ValueError, TypeError: not one finite number per ARM (or one for all).
        """
        self._row.weights = self._model.expand_weights(check_weights(weights, len(self._model.arms)))

    @property
    def output(self) -> GenerationOutput:
        """The whole output.

        Raises:
            RuntimeError: before the end. After `close` in mid-generation, finish_reason is "cancelled".
        """
        if not self._closed and self._row.finish_reason is None:
            raise RuntimeError("output: expected the stream to be at its end, or closed")
        return self._model.build_output([self._row])

    def close(self) -> None:
        """Stop here and free the caches."""
        self._closed = True
        self._rounds.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
