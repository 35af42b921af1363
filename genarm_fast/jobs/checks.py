"""Tokenise prompts ahead of their turn, so that a prompt that fits no context is reported early."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from genarm_fast.jobs.inputs import JobRequest
from genarm_fast.text.given import Prompt
from genarm_fast.utils.jsonlines import located


class Checks:
    """Checks requests in order, as far as time allows.

    prepare: the model's method. as_prompt: returns the prompt that the model gets for a line's prompt. All methods
    raise ValueError, naming file and line, for a prompt that the model cannot take.
    """

    def __init__(
        self, prepare: Callable[..., Any], requests: Sequence[JobRequest], as_prompt: Callable[[Prompt], Prompt]
    ) -> None:
        self._prepare, self._as_prompt, self._rest = prepare, as_prompt, iter(requests)
        self.checked = 0

    def one(self, request: JobRequest) -> None:
        with located(request.file, request.line):
            self._prepare([self._as_prompt(request.prompt)], request.params)

    def check_until(self, count: int) -> None:
        """Check requests until the first `count` are checked."""
        while self.checked < count and self._next():
            pass

    def check_for(self, seconds: float) -> None:
        """Check requests for this many seconds, or until all are checked."""
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
