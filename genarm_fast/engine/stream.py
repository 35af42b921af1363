"""Streaming: chunks of text as they are decoded, with weights that may change meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from genarm_fast.engine.sequence import Sequence, output_of
from genarm_fast.errors import GenerationError, error_text
from genarm_fast.outputs import GenerationOutput
from genarm_fast.params import AnyWeights, Weight, weights_per_arm
from genarm_fast.utils.checks import check_integer

if TYPE_CHECKING:
    from genarm_fast.engine.engine import Engine


@dataclass(slots=True)
class StreamChunk:
    """The tokens and text that one step added to one request.

    text: new text; empty while a character is incomplete or the text may be the beginning of a stop string. token_ids:
    the tokens of this step, more than one if drafts were right. weights: the ARM weights that each of them was drawn
    with. index: the index of the prompt. finish_reason: None before the end.
    """

    text: str
    token_ids: list[int]
    weights: list[tuple[float, ...]]
    index: int = 0
    finish_reason: str | None = None


class ChunkMaker:
    """Record of how much of its sequences a stream has shown. One step shows at most one chunk of each sequence."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self._shown = [(0, 0, False)] * len(sequences)  # characters and tokens shown, and whether the end was shown

    def chunk(self, sequence: Sequence) -> StreamChunk | None:
        """Return the part of a sequence that is new; None if nothing is new, or if the sequence failed.

        Another thread may extend the sequence meanwhile: the lengths are read first, and only the part before them is
        shown.
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
    """The sequences of a stream, one per prompt: changes of their weights, and their outputs."""

    def __init__(self, sequences: list[Sequence], arm_names: list[str]) -> None:
        self.sequences, self.arm_names = sequences, arm_names
        self._weights = [sequence.weights for sequence in sequences]  # the weights that were set last

    def chosen(self, index: int | None) -> Iterable[int]:
        """Return the chosen indices: this one, or all for None.

        Raises TypeError for other types than an integer, IndexError if no prompt has this index.
        """
        count = len(self.sequences)
        expected = f"0..{count - 1}, one of the prompts"
        try:
            return range(count) if index is None else [check_integer("index", index, expected, 0, high=count - 1)]
        except ValueError as error:
            raise IndexError(str(error)) from None

    def changed(self, weights: AnyWeights, index: int | None) -> list[tuple[Sequence, tuple[Weight, ...]]]:
        """Return the sequences to change, with their new weights. Arguments and errors as in `Stream.set_weights`."""
        expanded = {i: weights_per_arm(weights, self.arm_names, self._weights[i]) for i in self.chosen(index)}
        for i, own in expanded.items():
            self._weights[i] = own
        return [(self.sequences[i], own) for i, own in expanded.items()]

    def outputs(self) -> list[GenerationOutput]:
        return [output_of([sequence], self.arm_names) for sequence in self.sequences]

    def failure(self) -> GenerationError | None:
        """Return the error that names all failed sequences, with the outputs of all; None if none failed."""
        failed = [sequence for sequence in self.sequences if sequence.error is not None]
        return failure(failed, list(self.outputs())) if failed else None


class Stream:
    """Iterator over `StreamChunk`s, made by `GenARM.stream`. The texts of a request's chunks join to its output's text.

    Each prompt is decoded further only after its last chunk was taken. `close`, or the end of a `with` block, frees the
    slots at once.
    """

    def __init__(self, engine: Engine, sequences: list[Sequence], arm_names: list[str]) -> None:
        self._engine, self._sequences = engine, list(sequences)
        self._steering = Steering(self._sequences, arm_names)
        self._run = engine.run(self._sequences, stepwise=True)
        self._chunks: deque[StreamChunk] = deque()
        self._chunk_maker = ChunkMaker(sequences)
        self._closed = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StreamChunk:
        """Return the next chunk.

        Raises GenerationError if requests failed, after all others ended. Its outputs hold all text that there is.
        """
        while not self._chunks:
            try:
                advanced = next(self._run)
            except StopIteration:
                error = None if self._closed else self._steering.failure()
                self.close()
                if error is not None:
                    raise error from error.__cause__
                raise
            self._chunks += filter(None, map(self._chunk_maker.chunk, advanced))
        return self._chunks.popleft()

    def set_weights(self, weights: AnyWeights, index: int | None = None) -> None:
        """Set the ARM weights from the next token on, for one prompt or for all prompts. Any thread may call this.

        Weights by name change those ARMs alone. A list of numbers counts from the first token of the response. During a
        step, the new weights count from the step after it. Each chunk has the weights that its tokens were drawn with.

        Raises:
            ValueError, TypeError: not one finite number per ARM (or one for all).
            IndexError: no prompt has this index.
        """
        for sequence, own in self._steering.changed(weights, index):
            self._engine.steer(sequence, own)

    @property
    def outputs(self) -> list[GenerationOutput]:
        """The whole output of every prompt. After `close` in mid-generation, finish_reason is "cancelled".

        Raises:
            RuntimeError: the stream has neither ended nor been closed.
        """
        if not self._closed and not all(sequence.ended for sequence in self._sequences):
            raise RuntimeError("output: expected the stream to be at its end, or closed")
        return self._steering.outputs()

    @property
    def output(self) -> GenerationOutput:
        """The output of the first prompt. Raises the same errors as `outputs`."""
        return self.outputs[0]

    def close(self, index: int | None = None) -> None:
        """Stop the stream, also in mid-generation. During a step, which another thread may run, it stops after that.

        index: the prompt to stop alone, while the others go on. None stops all.

        Raises:
            IndexError: no prompt has this index.
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
    """Return the error that names all failed requests. Its cause is the error of the first one."""
    message = "; ".join(f"prompts[{sequence.request.index}]: {error_text(sequence.error)}" for sequence in failed)
    error = GenerationError(message, outputs)
    error.__cause__ = failed[0].error
    return error


def outputs_of(groups: list[list[Sequence]], arm_names: list[str]) -> list[GenerationOutput]:
    """Return the output of every request from its ended sequences. Raises GenerationError if some failed."""
    failed = [sequence for group in groups for sequence in group if sequence.error is not None]
    outputs = [None if any(each.error for each in group) else output_of(group, arm_names) for group in groups]
    if failed:
        error = failure(failed, outputs)
        raise error from error.__cause__
    return [output for output in outputs if output is not None]


def completed(
    engine: Engine, groups: list[list[Sequence]], arm_names: list[str]
) -> Iterator[tuple[int, GenerationOutput | Exception]]:
    """Iterate over (index of a request, its output or error), each when the last of its sequences ends.

    Raises any error that a step raises.
    """
    told: set[int] = set()
    with engine.run([sequence for group in groups for sequence in group]) as run:
        for advanced in run:
            for index in dict.fromkeys(sequence.request.index for sequence in advanced if sequence.ended):
                group = groups[index]
                if index not in told and all(sequence.ended for sequence in group):
                    told.add(index)
                    yield index, next((each.error for each in group if each.error), output_of(group, arm_names))
