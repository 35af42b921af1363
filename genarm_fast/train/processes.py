"""Training in several processes, one a device, as `torchrun` or `accelerate launch` starts them.

In a process that runs alone nothing is sent, and every function here gives back what it got.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")
LAUNCHED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def join() -> None:
    """Meets the other processes: over gloo on a CPU, over NCCL on CUDA.

    Raises:
        ValueError: WORLD_SIZE says that there are others, and not how to meet them.
    """
    if count() > 1:
        if missing := [name for name in LAUNCHED if name not in os.environ]:
            raise ValueError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']}: expected {', '.join(missing)} beside it, as torchrun and "
                "accelerate launch set them"
            )
        from accelerate import PartialState

        PartialState(cpu=not torch.accelerator.is_available())


def leave() -> None:
    """Takes leave of the others, at the end of a command."""
    if count() > 1 and distributed.is_initialized():
        distributed.destroy_process_group()


def from_first(decide: Callable[[], T]) -> T:
    """What the first process gets from `decide`, in all of them; so is what it raises. All must call this."""
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


def gathered(values: list[T]) -> list[T]:
    """The lists of all processes one behind the other, in all of them. All must call this."""
    if count() == 1:
        return values
    lists: list[list[T]] = [[] for _ in range(count())]
    distributed.all_gather_object(lists, values)
    return [value for each in lists for value in each]


def together() -> None:
    """Returns once all processes have called this."""
    if count() > 1:
        distributed.barrier()
