"""Pace of prefill: how many prompt tokens a step may take, so that running sequences get their next token in time."""

from __future__ import annotations

import time

MIN_CHUNK_TOKENS = 16  # fewest tokens that a step prefills, so that each prompt ends; they cost hardly more than 4
NEWEST_WEIGHT = 0.3  # weight of the newest measurement in the running average
# Largest growth from one chunk to the next. A token of a small chunk costs more than one of a large chunk, so small
# chunks tell little about large ones.
MAX_GROWTH = 2.0

clock = time.perf_counter


class Pace:
    """Learns the time of a step: `decoding` seconds without prompts, and `per_token` more for every prefilled token.

    The host measures how long its steps take. On a device that works behind the host, this is the device's time once
    the host has to wait for it.
    """

    def __init__(self) -> None:
        self.decoding: float | None = None
        self.per_token: float | None = None
        self._last_tokens = MIN_CHUNK_TOKENS

    def tokens(self, max_step_ms: float | None) -> int | None:
        """Return the most tokens that the next chunk may have beside running sequences; None for any number."""
        if max_step_ms is None:
            return None
        if self.per_token is None or self.decoding is None:
            return MIN_CHUNK_TOKENS
        left = max_step_ms / 1000 - self.decoding
        fitting = left / self.per_token if self.per_token > 0 else self._last_tokens * MAX_GROWTH
        return max(MIN_CHUNK_TOKENS, int(min(fitting, self._last_tokens * MAX_GROWTH)))

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from a step with running sequences: the prompt tokens that it prefilled, and its seconds."""
        if not tokens:
            self.decoding = _running_average(self.decoding, seconds)
        elif self.decoding is not None:
            self.per_token = _running_average(self.per_token, max(seconds - self.decoding, 0.0) / tokens)
            self._last_tokens = tokens


def _running_average(old: float | None, new: float) -> float:
    return new if old is None else (1 - NEWEST_WEIGHT) * old + NEWEST_WEIGHT * new
