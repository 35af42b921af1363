"""Configuration of an engine: its limits."""

from __future__ import annotations

from dataclasses import dataclass

from genarm_fast.utils.checks import check_integer, check_real


@dataclass
class EngineConfig:
    """Limits of an engine, checked.

    max_batch_size: most sequences that are decoded together. cache_bytes: most bytes that all KV caches may take
    together; None for no limit but the memory. max_step_ms: milliseconds that a step may take while prompts are
    prefilled; None for no limit.

    Raises:
        TypeError, ValueError: a value that is none of these.
    """

    max_batch_size: int = 16
    cache_bytes: int | None = None
    max_step_ms: float | None = None

    def __post_init__(self) -> None:
        self.max_batch_size = check_integer("max_batch_size", self.max_batch_size, "an integer >= 1", 1)
        if self.cache_bytes is not None:
            self.cache_bytes = check_integer("cache_bytes", self.cache_bytes, "an integer >= 1 or None", 1)
        if self.max_step_ms is not None:
            expected = "a finite number > 0 or None"
            self.max_step_ms = check_real("max_step_ms", self.max_step_ms, expected, 0, open_low=True)
