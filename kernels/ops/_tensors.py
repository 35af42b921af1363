"""What kernels that read a tensor's memory ask of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its memory does not hold its values: PyTorch negates and conjugates by setting a bit."""
    return tensor.resolve_neg().resolve_conj()


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, whose memory holds its values, contiguous in the last dimension."""
    tensor = in_memory(tensor)
    return tensor if not tensor.ndim or tensor.stride(-1) == 1 else tensor.contiguous()


def launching_on(device: torch.device) -> AbstractContextManager:
    """The context in which Triton launches on this device; the interpreter and the compile-only driver see the CPU."""
    return torch.get_device_module(device).device(device) if device.type != "cpu" else nullcontext()
