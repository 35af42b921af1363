"""Streaming: chunks of text as they come, with weights that may change on the way."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from genarm_fast.engine.sequence import Sequence, output_of
from genarm_fast.errors import GenerationError
from genarm_fast.outputs import GenerationOutput
from genarm_fast.params import AnyWeights, weights_per_arm

if TYPE_CHECKING:
    from genarm_fast.engine.engine import Engine


@dataclass(slots=True)
class StreamChunk:
    """What one step added to one request.

    text: may be empty while a character or a possible stop string is open. token_ids: the tokens of this step, more
    than one where drafts were right. weights: the ARM weights that each of them was drawn with. index: of the prompt.
    finish_reason: None before the end.
    """

    text: str
    token_ids: list[int]
    weights: list[tuple[float, ...]]
    index: int = 0
    finish_reason: str | None = None


class Stream:
    """Iterator over `StreamChunk`s; a request's texts joined are its output's text. Made by `GenARM.stream`.

    No prompt goes on before its last chunk was taken. Leaving the stream (`close`, or the end of a `with` block) frees
    its slots at once.
    """

    def __init__(self, engine: Engine, sequences: list[Sequence], arm_names: list[str]) -> None:
        self._engine, self._arm_names = engine, arm_names
        self._sequences = list(sequences)
        self._run = engine.run(self._sequences, stepwise=True)
        self._chunks: deque[StreamChunk] = deque()
        self._shown = [(0, 0)] * len(self._sequences)  # characters and tokens
        self._closed = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StreamChunk:
        """Raises GenerationError once all others ended if requests failed, with what there is in its outputs."""
        while not self._chunks:
            try:
                advanced = next(self._run)
            except StopIteration:
                failed = [] if self._closed else [each for each in self._sequences if each.error is not None]
                self.close()
                if failed:
                    raise failure(failed, list(self.outputs)) from failed[0].error
                raise
            for sequence in advanced:
                self._show(sequence)
        return self._chunks.popleft()

    def _show(self, sequence: Sequence) -> None:
        index = sequence.request.index
        characters, tokens = self._shown[index]
        self._shown[index] = len(sequence.text), len(sequence.tokens)
        if sequence.error is None:
            news = sequence.text[characters:], sequence.tokens[tokens:], sequence.used_weights[tokens:]
            self._chunks.append(StreamChunk(*news, index, sequence.finish_reason))

    def set_weights(self, weights: AnyWeights, index: int | None = None) -> None:
        """Use other ARM weights from the next token on, for one prompt or for all of them; from any thread.

        Weights by name change these ARMs' alone. A list per token counts from the first token of the response.

        In the middle of a step they count from the step after it; each chunk says what its tokens were drawn with.

        Raises:
            ValueError, TypeError: not one finite number per ARM (or one for all).
            IndexError: no such prompt.
        """
        chosen = self._chosen(index)
        expanded = [weights_per_arm(weights, self._arm_names, sequence.weights) for sequence in chosen]
        for sequence, own in zip(chosen, expanded):
            self._engine.steer(sequence, own)

    @property
    def outputs(self) -> list[GenerationOutput]:
        """The whole output of every prompt.

        Raises:
            RuntimeError: before the end. After `close` in mid-generation, finish_reason is "cancelled".
        """
        if not self._closed and not all(sequence.ended for sequence in self._sequences):
            raise RuntimeError("output: expected the stream to be at its end, or closed")
        return [output_of([sequence], self._arm_names) for sequence in self._sequences]

    @property
    def output(self) -> GenerationOutput:
        """The output of the first prompt. Raises as `outputs`."""
        return self.outputs[0]

    def close(self, index: int | None = None) -> None:
        """Stop here, in mid-generation too; in mid-step (from another thread, or a logits processor): after it.

        index: of the prompt whose text ends here, while the others go on; None for all.

        Raises:
            IndexError: no such prompt.
        """
        if index is not None:
            self._engine.abort(self._chosen(index))
            return
        self._closed = True
        self._run.close()

    def _chosen(self, index: int | None) -> list[Sequence]:
        count = len(self._sequences)
        if index is not None and not 0 <= index < count:
            raise IndexError(f"index={index}: expected 0..{count - 1}, one of the prompts")
        return self._sequences if index is None else [self._sequences[index]]

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def failure(failed: list[Sequence], outputs: list[GenerationOutput | None]) -> GenerationError:
    """The error that names all requests that failed."""
    message = "; ".join(f"prompts[{sequence.request.index}]: {sequence.error}" for sequence in failed)
    return GenerationError(message, outputs)
