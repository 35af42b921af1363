"""Streaming in an event loop: an asynchronous iterator over the same chunks that `Stream` gives."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType

from genarm_fast.engine.call import Call
from genarm_fast.engine.engine import Engine
from genarm_fast.engine.engine_thread import EngineThread
from genarm_fast.engine.sequence import Sequence
from genarm_fast.engine.stream import ChunkMaker, Steering, StreamChunk
from genarm_fast.outputs import GenerationOutput
from genarm_fast.params import AnyWeights

Parts = tuple[EngineThread, Engine, list[Sequence], list[str]]


class AsyncStream:
    """Asynchronous iterator over `StreamChunk`s for one task of one event loop. `GenARM.astream` makes it.

    Decoding begins when the first chunk is asked for, or with `async with`. Each prompt is decoded at most `ahead`
    chunks further than its reader has asked for. `aclose` frees the slots, and so does the end of an `async with`
    block. To cancel the task that waits for a chunk, or to drop the stream, frees them too.
    """

    def __init__(self, prepare: Callable[[], Awaitable[Parts]], ahead: int) -> None:
        """Make a stream that has not begun. prepare: checks arguments and makes the sequences in another thread."""
        self._prepare, self._ahead = prepare, ahead
        self._beginning = self._closed = False
        self._steering: Steering | None = None
        self._call: Call | None = None

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> StreamChunk:
        """Return the next chunk.

        Raises:
            GenerationError: if requests failed, after all others ended. Its outputs hold all text that there is.
            TypeError, ValueError: for wrong arguments, as `generate`; on the first chunk alone.
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
        """Begin the stream if it has not begun, and return its call and steering."""
        if self._call is None or self._steering is None:
            if self._beginning:
                raise RuntimeError("another task waits for the next chunk: expected one reader")
            self._beginning = True
            try:
                thread, engine, sequences, arm_names = await self._prepare()
            finally:
                self._beginning = False
            if self._closed:  # another task has closed the stream meanwhile
                raise StopAsyncIteration
            self._steering = Steering(sequences, arm_names)
            self._call = thread.call(engine, sequences, ChunkMaker(sequences).chunk, self._ahead)
        return self._call, self._steering

    def set_weights(self, weights: AnyWeights, index: int | None = None) -> None:
        """Set the ARM weights of all tokens that are not drawn yet: see `Stream.set_weights`.

        Raises:
            ValueError, TypeError: not one finite number per ARM (or one for all).
            IndexError: no prompt has this index.
            RuntimeError: the stream has not begun.
        """
        if self._call is None or self._steering is None:
            raise RuntimeError("set_weights: expected the stream to have begun, by its first chunk or `async with`")
        for sequence, own in self._steering.changed(weights, index):
            self._call.steer(sequence, own)

    @property
    def outputs(self) -> list[GenerationOutput]:
        """The whole output of every prompt. After `aclose` in mid-generation, finish_reason is "cancelled".

        Raises:
            RuntimeError: the stream has neither ended nor been closed.
        """
        if self._call is None or self._steering is None or not self._call.over:
            raise RuntimeError("output: expected the stream to be at its end, or closed")
        return self._steering.outputs()

    @property
    def output(self) -> GenerationOutput:
        """The output of the first prompt. Raises the same errors as `outputs`."""
        return self.outputs[0]

    async def aclose(self, index: int | None = None) -> None:
        """Stop the stream, also in mid-generation. When this returns, the slots are free.

        index: the prompt to stop alone, after the step that runs, while the others go on. None stops all.

        Raises:
            IndexError: no prompt has this index.
            RuntimeError: an index is given, but the stream has not begun.
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
        call: Call | None = getattr(self, "_call", None)  # missing if `__init__` failed
        if call is not None:
            call.close()
