"""Detect weights of a given model that were bound to other memory after loading.

The engine reads weights at the addresses that they had at loading. Changes in place count, but `p.data = ...` or
`.to(...)` leave the engine with the old numbers. Checking 300 parameters takes some 50 µs, once a run.
"""

from __future__ import annotations

from torch import nn


class WeightWatch:
    """The addresses of a given model's parameters at the time when the watch was made."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.addresses = self._addresses()

    def moved(self) -> str | None:
        """Return the name of a parameter whose address has changed, or None."""
        now = self._addresses()
        return next((name for name, address in self.addresses.items() if now.get(name) != address), None)

    def _addresses(self) -> dict[str, int]:
        return {name: parameter.data_ptr() for name, parameter in self.model.named_parameters()}
