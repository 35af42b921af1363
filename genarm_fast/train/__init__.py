"""Training of autoregressive reward models from preference pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from genarm_fast.train.config import TrainConfig

if TYPE_CHECKING:
    from genarm_fast.train.run import TrainReport, train

__all__ = ["TrainConfig", "TrainReport", "train"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when training begins: `genarm-fast train --help` needs neither."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from genarm_fast.train import run

    return getattr(run, name)
