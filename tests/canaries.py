"""Canary memory around the buffers of Triton's interpreter: it reveals reads and writes outside them."""

import math
import os

import torch

assert os.environ.get("TRITON_INTERPRET") == "1"  # set before triton was imported
MARGIN = 2048  # elements, more than a tile has


class Canaries:
    """Buffers with canary memory on both sides. A read outside a buffer meets a NaN, which the row's status reports. A
    write outside it changes the canary.

    Memory starts as NaN, so that an unwritten element cannot pass for a result.
    """

    def __init__(self):
        self.buffers = []

    def allocate(self, *size, dtype=torch.float32, device=None):
        size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        inner = math.prod(size)
        value = math.nan if dtype.is_floating_point else -1234567
        self.buffers.append(torch.full((inner + 2 * MARGIN,), value, dtype=dtype))
        return self.buffers[-1][MARGIN : MARGIN + inner].view(size)

    def allocate_like(self, tensor, dtype=None):
        return self.allocate(tensor.shape, dtype=dtype or tensor.dtype)

    def embed(self, tensor):
        return self.allocate(tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def untouched(self):
        def intact(margin):
            return (
                margin.isnan().all()
                if margin.is_floating_point()
                else (margin == torch.full_like(margin, -1234567)).all()
            )

        return all(intact(buffer[:MARGIN]) and intact(buffer[-MARGIN:]) for buffer in self.buffers)
