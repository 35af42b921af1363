"""Bring tensors into a form whose memory a kernel can read."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def in_memory(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if its memory does not hold its values.

    PyTorch negates and conjugates some tensors only by setting a bit.
    """
    return tensor.resolve_neg().resolve_conj()


def dense(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy, whose memory holds its values and which is contiguous in its last dimension."""
    tensor = in_memory(tensor)
    return tensor if not tensor.ndim or tensor.stride(-1) == 1 else tensor.contiguous()


def launching_on(device: torch.device) -> AbstractContextManager:
    """Return the context in which Triton launches on this device.

    On the CPU, where Triton's interpreter and the compile-only driver of the tests run, the context does nothing.
    """
    return torch.get_device_module(device).device(device) if device.type != "cpu" else nullcontext()
