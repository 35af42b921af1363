"""Devices: streams, graphs and read-back behind one small interface."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from genarm_fast.device.base import Device
from genarm_fast.device.cuda import Cuda

__all__ = ["Cuda", "Device", "device_for"]


def device_for(devices: Sequence[torch.device]) -> Device:
    """Return the `Device` for members on these torch devices, the base's first."""
    if devices[0].type == "cuda":
        return Cuda()
    # A thread's own CPU time leaves out other processes, but also the work of another device.
    precise = time.get_clock_info("thread_time").resolution < 1e-4
    return Device(time.thread_time if precise and {device.type for device in devices} == {"cpu"} else time.perf_counter)
