"""`agenerate` and `astream`: the calls for event loops, with the arguments and results of `generate` and `stream`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from collections.abc import Sequence as Many
from typing import Any

from genarm_fast.engine.async_stream import AsyncStream, Parts
from genarm_fast.engine.owner import EngineOwner
from genarm_fast.engine.stream import outputs_of
from genarm_fast.outputs import GenerationOutput
from genarm_fast.params import SamplingParams
from genarm_fast.speculation.config import Speculation
from genarm_fast.utils.checks import check_integer
from genarm_fast.utils.progress import progress_bar


class AsyncCalls(EngineOwner):
    """A model's calls for event loops. While there are any, one thread steps the model's engine for all of them."""

    async def agenerate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Many[SamplingParams] | None = None,
        *,
        progress: bool = False,
        speculation: str | Speculation | None = None,
        **overrides: Any,
    ) -> list[GenerationOutput]:
        """Do as `generate` without blocking the event loop: arguments, result and errors are the same.

        Calls of all tasks and event loops share steps, also with `generate` in other threads. If the task is
        cancelled, its sequences leave the engine after the step that runs.

        Raises:
            RuntimeError: called by a logits processor of this model, whose step would wait for itself.
        """
        self._refuse_in_mid_step()
        given = (prompts, sampling_params, speculation, overrides)
        engine, groups = await asyncio.to_thread(self._decoding, *given)
        sequences = [sequence for group in groups for sequence in group]
        call = self._engine_thread().call(engine, sequences, lambda sequence: sequence if sequence.ended else None)
        try:
            with progress_bar(len(sequences), progress) as advance:
                while True:
                    try:
                        await call.next()
                    except StopAsyncIteration:
                        break
                    advance(1)
        finally:
            call.close()
        return outputs_of(groups, self.arm_names)

    def astream(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Many[SamplingParams] | None = None,
        *,
        ahead: int = 0,
        speculation: str | Speculation | None = None,
        **overrides: Any,
    ) -> AsyncStream:
        """Do as `stream` in an event loop: `async for chunk in model.astream(...)`. Arguments and errors as there.

        Args:
            ahead: chunks of each prompt that may be decoded before the reader asks for them. With 0, weights that are
                set between two chunks count from the next chunk on. A larger number keeps the engine at work while
                readers do something else.

        Raises:
            TypeError, ValueError: `ahead` is wrong. Errors in other arguments are raised when the stream begins.
        """
        ahead = check_integer("ahead", ahead, "an integer >= 0", 0)

        async def prepare() -> Parts:
            return await self.parts_of_stream(prompts, sampling_params, speculation, overrides)

        return AsyncStream(prepare, ahead)

    async def parts_of_stream(
        self, prompts: Any, sampling_params: Any, speculation: Any, overrides: Mapping[str, Any]
    ) -> Parts:
        """Return the parts of an `AsyncStream`: thread, engine, sequences, names of ARMs. Arguments as in `astream`."""
        self._refuse_in_mid_step()
        given = (prompts, sampling_params, speculation, overrides)
        engine, groups = await asyncio.to_thread(self._decoding, *given, True)
        return self._engine_thread(), engine, [sequence for (sequence,) in groups], self.arm_names

    def _refuse_in_mid_step(self) -> None:
        if self._engine is not None and self._engine.turns.is_mine:
            raise RuntimeError("the engine is in the middle of a step of this thread: expected `generate` or `stream`")
