"""Training in several processes, one for each device, as `torchrun` or `accelerate launch` starts them.

In a process that runs alone nothing is sent, and every function here returns what it got.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def count() -> int:
    """Return the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def connect() -> None:
    """Connect to the other processes: over gloo on a CPU, over NCCL on CUDA.

    Raises:
        ValueError: WORLD_SIZE is above 1, but the variables that tell how to connect are missing.
    """
    if count() > 1:
        if missing := [name for name in LAUNCHER_VARIABLES if name not in os.environ]:
            raise ValueError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']}: expected {', '.join(missing)} beside it, as torchrun and "
                "accelerate launch set them"
            )
        from accelerate import PartialState

        PartialState(cpu=not torch.accelerator.is_available())


def disconnect() -> None:
    """Disconnect from the other processes, at the end of a command."""
    if count() > 1 and distributed.is_initialized():
        distributed.destroy_process_group()


def from_first(decide: Callable[[], T]) -> T:
    """Return in all processes what `decide` returns in the first, or raise what it raises. All must call this."""
    if count() == 1:
        return decide()
    sent: list[Any] = [None, None]
    if rank() == 0:
        try:
            sent[0] = decide()
        except Exception as error:
            sent[1] = error
    distributed.broadcast_object_list(sent)
    if sent[1] is not None:
        raise sent[1]
    return sent[0]


def all_gather(values: list[T]) -> list[T]:
    """Return, in all processes, the lists of all processes one after another. All must call this."""
    if count() == 1:
        return values
    lists: list[list[T]] = [[] for _ in range(count())]
    distributed.all_gather_object(lists, values)
    return [value for each in lists for value in each]
