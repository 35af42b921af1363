"""Prompts are tokenised ahead of their turn, so that one that no context holds is named early."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from genarm_fast.jobs.inputs import JobRequest
from genarm_fast.text.given import Prompt
from genarm_fast.utils.jsonlines import located


class Checks:
    """Checks requests in order, as far as there is time. prepare: of the model. as_prompt: what it makes of a prompt.

    All methods raise ValueError that names file and line.
    """

    def __init__(
        self, prepare: Callable[..., Any], requests: Sequence[JobRequest], as_prompt: Callable[[Prompt], Prompt]
    ) -> None:
        self._prepare, self._as_prompt, self._rest = prepare, as_prompt, iter(requests)
        self.checked = 0

    def one(self, request: JobRequest) -> None:
        with located(request.file, request.line):
            self._prepare([self._as_prompt(request.prompt)], request.params)

    def through(self, count: int) -> None:
        """The first `count` requests are checked when this returns."""
        while self.checked < count and self._next():
            pass

    def spend(self, seconds: float) -> None:
        """Checks for so long, or until all are checked."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._next():
            pass

    def _next(self) -> bool:
        request = next(self._rest, None)
        if request is None:
            return False
        self.one(request)
        self.checked += 1
        return True
