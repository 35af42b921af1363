"""Training autoregressive reward models from preference pairs."""

from .config import TrainConfig
from .run import TrainReport, train

__all__ = ["TrainConfig", "TrainReport", "train"]
