"""How many tokens of prompts a step may prefill, so that those who are generating get their next token in time."""

from __future__ import annotations

import time

LEAST = 16  # tokens that a step prefills in any case, or a prompt would never end; hardly dearer than 4
WEIGHT = 0.3  # of the newest measurement
GROWTH = 2.0  # most from one chunk to the next: small chunks cost more a token, so they say little of large ones

clock = time.perf_counter


class Pace:
    """Learns what a step takes: `decoding` seconds without prompts, `per_token` more for every prefilled token.

    Both are measured on the host, as its steps' length. On a device that runs behind, that length is the device's as
    soon as the host has to wait for it.
    """

    def __init__(self) -> None:
        self.decoding: float | None = None
        self.per_token: float | None = None
        self._last = LEAST

    def tokens(self, max_step_ms: float | None) -> int | None:
        """Tokens that the next chunk may have beside running sequences; None: any number."""
        if max_step_ms is None:
            return None
        if self.per_token is None or self.decoding is None:
            return LEAST
        left = max_step_ms / 1000 - self.decoding
        fitting = left / self.per_token if self.per_token > 0 else self._last * GROWTH
        return max(LEAST, int(min(fitting, self._last * GROWTH)))

    def observe(self, tokens: int, seconds: float) -> None:
        """A step with running sequences took so long, and prefilled so many tokens of prompts."""
        if not tokens:
            self.decoding = _mixed(self.decoding, seconds)
        elif self.decoding is not None:
            self.per_token = _mixed(self.per_token, max(seconds - self.decoding, 0.0) / tokens)
            self._last = tokens


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else (1 - WEIGHT) * old + WEIGHT * new
