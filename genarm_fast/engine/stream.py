"""Streaming: chunks of text as they come, with weights that may change on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from genarm_fast.engine.sequence import Sequence, output_of
from genarm_fast.errors import GenerationError, said
from genarm_fast.outputs import GenerationOutput
from genarm_fast.params import AnyWeights, Weight, weights_per_arm
from genarm_fast.utils.checks import check_integer

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


class Shown:
    """What a stream has shown of its sequences. One step shows at most one chunk of each."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self._shown = [(0, 0, False)] * len(sequences)  # characters, tokens, whether that was the end

    def chunk(self, sequence: Sequence) -> StreamChunk | None:
        """What is new of a sequence; None for one that failed, and where nothing is new.

        What is read first is read again later, so that it may go on in another thread meanwhile.
        """
        reason, index = sequence.finish_reason, sequence.request.index
        before, seen = self._shown[index], (len(sequence.text), len(sequence.tokens), reason is not None)
        if sequence.error is not None or seen == before:
            return None
        self._shown[index] = seen
        characters, tokens = (slice(start, end) for start, end in zip(before, seen[:2]))
        news = sequence.text[characters], sequence.tokens[tokens], sequence.used_weights[tokens]
        return StreamChunk(*news, index, reason)


class Steering:
    """Sequences of a stream, one per prompt, whose weights may change, and their outputs."""

    def __init__(self, sequences: list[Sequence], arm_names: list[str]) -> None:
        self.sequences, self.arm_names = sequences, arm_names
        self._weights = [sequence.weights for sequence in sequences]  # the last ones that were asked for

    def chosen(self, index: int | None) -> Iterable[int]:
        """The prompt with this index, or all. Raises TypeError for no integer, IndexError where there is none."""
        count = len(self.sequences)
        expected = f"0..{count - 1}, one of the prompts"
        try:
            return range(count) if index is None else [check_integer("index", index, expected, 0, high=count - 1)]
        except ValueError as error:
            raise IndexError(str(error)) from None

    def changed(self, weights: AnyWeights, index: int | None) -> list[tuple[Sequence, tuple[Weight, ...]]]:
        """Sequences with the weights that they are to have. Arguments and errors as in `Stream.set_weights`."""
        expanded = {i: weights_per_arm(weights, self.arm_names, self._weights[i]) for i in self.chosen(index)}
        for i, own in expanded.items():
            self._weights[i] = own
        return [(self.sequences[i], own) for i, own in expanded.items()]

    def outputs(self) -> list[GenerationOutput]:
        return [output_of([sequence], self.arm_names) for sequence in self.sequences]

    def failure(self) -> GenerationError | None:
        """The error for those that failed, with what there is in its outputs."""
        failed = [sequence for sequence in self.sequences if sequence.error is not None]
        return failure(failed, list(self.outputs())) if failed else None


class Stream:
    """Iterator over `StreamChunk`s; a request's texts joined are its output's text. Made by `GenARM.stream`.

    No prompt goes on before its last chunk was taken. Leaving the stream (`close`, or the end of a `with` block) frees
    its slots at once.
    """

    def __init__(self, engine: Engine, sequences: list[Sequence], arm_names: list[str]) -> None:
        self._engine, self._sequences = engine, list(sequences)
        self._steering = Steering(self._sequences, arm_names)
        self._run = engine.run(self._sequences, stepwise=True)
        self._chunks: deque[StreamChunk] = deque()
        self._shown = Shown(sequences)
        self._closed = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StreamChunk:
        """Raises GenerationError once all others ended if requests failed, with what there is in its outputs."""
        while not self._chunks:
            try:
                advanced = next(self._run)
            except StopIteration:
                error = None if self._closed else self._steering.failure()
                self.close()
                if error is not None:
                    raise error from error.__cause__
                raise
            self._chunks += filter(None, map(self._shown.chunk, advanced))
        return self._chunks.popleft()

    def set_weights(self, weights: AnyWeights, index: int | None = None) -> None:
        """Use other ARM weights from the next token on, for one prompt or for all of them; from any thread.

        Weights by name change these ARMs' alone. A list per token counts from the first token of the response.

        In the middle of a step they count from the step after it; each chunk says what its tokens were drawn with.

        Raises:
            ValueError, TypeError: not one finite number per ARM (or one for all).
            IndexError: no such prompt.
        """
        for sequence, own in self._steering.changed(weights, index):
            self._engine.steer(sequence, own)

    @property
    def outputs(self) -> list[GenerationOutput]:
        """The whole output of every prompt.

        Raises:
            RuntimeError: before the end. After `close` in mid-generation, finish_reason is "cancelled".
        """
        if not self._closed and not all(sequence.ended for sequence in self._sequences):
            raise RuntimeError("output: expected the stream to be at its end, or closed")
        return self._steering.outputs()

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
            self._engine.abort([self._sequences[i] for i in self._steering.chosen(index)])
            return
        self._closed = True
        self._run.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def failure(failed: list[Sequence], outputs: list[GenerationOutput | None]) -> GenerationError:
    """The error that names all requests that failed; the first one's own is its cause."""
    message = "; ".join(f"prompts[{sequence.request.index}]: {said(sequence.error)}" for sequence in failed)
    error = GenerationError(message, outputs)
    error.__cause__ = failed[0].error
    return error


def outputs_of(groups: list[list[Sequence]], arm_names: list[str]) -> list[GenerationOutput]:
    """The output of every request, from its sequences, all of which ended. Raises GenerationError if some failed."""
    failed = [sequence for group in groups for sequence in group if sequence.error is not None]
    outputs = [None if any(each.error for each in group) else output_of(group, arm_names) for group in groups]
    if failed:
        error = failure(failed, outputs)
        raise error from error.__cause__
    return [output for output in outputs if output is not None]


def completed(
    engine: Engine, groups: list[list[Sequence]], arm_names: list[str]
) -> Iterator[tuple[int, GenerationOutput | Exception]]:
    """(index of a request, its output or error), as the last of its sequences ends. Raises what a step raises."""
    told: set[int] = set()
    with engine.run([sequence for group in groups for sequence in group]) as run:
        for advanced in run:
            for index in dict.fromkeys(sequence.request.index for sequence in advanced if sequence.ended):
                group = groups[index]
                if index not in told and all(sequence.ended for sequence in group):
                    told.add(index)
                    yield index, next((each.error for each in group if each.error), output_of(group, arm_names))
