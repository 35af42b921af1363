"""What tests of Triton's interpreter share: launches between canaries without reads, and products of bfloat16."""

from contextlib import contextmanager
from unittest.mock import patch

import numpy
import torch
from canaries import Canaries
from torch.utils._python_dispatch import TorchDispatchMode
from triton import language as tl
from triton.runtime import interpreter


class NoReads(TorchDispatchMode):
    """Raises where the host asks for a number of a tensor, for which it would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a tensor"
        return func(*args, **kwargs or {})


@contextmanager
def between_canaries():
    """`embed` of tensors; what a launcher allocates lies between canaries too, and it must not read on the host."""
    canaries = Canaries()
    allocated = patch.object(torch, "empty", canaries.allocate)
    with allocated, patch.object(torch, "empty_like", canaries.allocate_like), NoReads():
        yield canaries
    assert canaries.untouched()


def _as_float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)


def _dot(builder, a, b, sums, precision, imprecise):
    """As tl.dot; the interpreter's own multiplies bfloat16 numbers as the integers that they are stored as."""
    product = numpy.matmul(_as_float32(a), _as_float32(b), dtype=sums.data.dtype)
    return interpreter.TensorHandle(product + sums.data, sums.dtype.scalar)


@contextmanager
def bfloat16_products():
    with patch.object(interpreter.InterpreterBuilder, "create_dot", _dot):
        yield
