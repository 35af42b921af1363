"""Streaming in an event loop: the chunks of `Stream`, awaited."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType

from genarm_fast.engine.call import Call
from genarm_fast.engine.engine import Engine
from genarm_fast.engine.engine_thread import EngineThread
from genarm_fast.engine.sequence import Sequence
from genarm_fast.engine.stream import Shown, Steering, StreamChunk
from genarm_fast.outputs import GenerationOutput
from genarm_fast.params import AnyWeights

Parts = tuple[EngineThread, Engine, list[Sequence], list[str]]


class AsyncStream:
    """Asynchronous iterator over `StreamChunk`s. Made by `GenARM.astream`; for one task of one event loop.

    It begins with its first chunk, or with `async with`. No prompt goes on before its last chunk was taken, or `ahead`
    chunks later. Leaving it frees its slots: by `aclose`, by the end of an `async with` block, by cancelling the task
    that waits for a chunk, or by dropping it.
    """

    def __init__(self, prepare: Callable[[], Awaitable[Parts]], ahead: int) -> None:
        """prepare: checks the arguments and makes the sequences, off the event loop."""
        self._prepare, self._ahead = prepare, ahead
        self._beginning = self._closed = False
        self._steering: Steering | None = None
        self._call: Call | None = None

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> StreamChunk:
        """Raises GenerationError once all others ended if requests failed, with what there is in its outputs.

        The first one also raises what `generate` raises for wrong arguments.
        """
        if self._closed:
            raise StopAsyncIteration
        call, steering = await self._begun()
        try:
            chunk = await call.next()
        except StopAsyncIteration:
            error = None if call.closed else steering.failure()
            await self.aclose()
            if error is not None:
                raise error from error.__cause__
            raise
        assert isinstance(chunk, StreamChunk)
        return chunk

    async def _begun(self) -> tuple[Call, Steering]:
        if self._call is None or self._steering is None:
            if self._beginning:
                raise RuntimeError("another task waits for the next chunk: expected one reader")
            self._beginning = True
            try:
                thread, engine, sequences, arm_names = await self._prepare()
            finally:
                self._beginning = False
            if self._closed:  # by another task meanwhile
                raise StopAsyncIteration
            self._steering = Steering(sequences, arm_names)
            self._call = thread.call(engine, sequences, Shown(sequences).chunk, self._ahead)
        return self._call, self._steering

    def set_weights(self, weights: AnyWeights, index: int | None = None) -> None:
        """Use other ARM weights from the next token on that is not drawn yet: see `Stream.set_weights`.

        Raises:
            ValueError, TypeError: not one finite number per ARM (or one for all).
            IndexError: no such prompt.
            RuntimeError: before it begins.
        """
        if self._call is None or self._steering is None:
            raise RuntimeError("set_weights: expected the stream to have begun, by its first chunk or `async with`")
        for sequence, own in self._steering.changed(weights, index):
            self._call.steer(sequence, own)

    @property
    def outputs(self) -> list[GenerationOutput]:
        """The whole output of every prompt.

        Raises:
            RuntimeError: before the end. After `aclose` in mid-generation, finish_reason is "cancelled".
        """
        if self._call is None or self._steering is None or not self._call.over:
            raise RuntimeError("output: expected the stream to be at its end, or closed")
        return self._steering.outputs()

    @property
    def output(self) -> GenerationOutput:
        """The output of the first prompt. Raises as `outputs`."""
        return self.outputs[0]

    async def aclose(self, index: int | None = None) -> None:
        """Stop here, in mid-generation too: when it returns, the slots are free.

        index: of the prompt whose text ends here, after the step that runs, while the others go on; None for all.

        Raises:
            IndexError: no such prompt.
            RuntimeError: an index before the stream begins.
        """
        if index is not None:
            if self._call is None or self._steering is None:
                raise RuntimeError("aclose: expected the stream to have begun, by its first chunk or `async with`")
            for i in self._steering.chosen(index):
                self._call.drop(self._call.sequences[i])
            return
        self._closed = True
        if self._call is not None:
            await self._call.closing()

    async def __aenter__(self) -> AsyncStream:
        await self._begun()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        call: Call | None = getattr(self, "_call", None)  # not there if `__init__` failed
        if call is not None:
            call.close()
