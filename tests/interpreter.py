"""Helpers for Triton's interpreter: launches between canaries that forbid host reads, and products of bfloat16."""

import sys
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy
import torch
from canaries import Canaries
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton import language as tl
from triton.runtime import interpreter

READS = (
    "tolist",
    "item",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
    "unique",
    "equal",
)
WAITING = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "equal"}


class _Operations(TorchDispatchMode):
    def __init__(self, masks):
        super().__init__()
        self.masks = masks

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"the host reads a tensor: {name}"
        indices = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        whole = self.masks or all(i is None or i.dtype == torch.int64 for i in indices)
        assert whole, f"the host reads a mask: {name}"
        return func(*args, **kwargs or {})


class _Calls(TorchFunctionMode):
    """Refuse host reads by function name: in inference mode `tolist` dispatches no operation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in READS, f"the host reads a tensor: {name}"
        return func(*args, **kwargs or {})


@contextmanager
def no_reads(masks=False):
    """Raise if the host asks for a number of a tensor, because it would wait for a GPU there.

    The interpreter's work inside a kernel is exempt, and so are checks of numbers that are made on the CPU alone.

    masks: allow boolean indices, for a test that uses them itself.
    """
    run = interpreter.InterpretedFunction.__getitem__

    def unseen(kernel, grid):
        def launch(*args, **kwargs):
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                run(kernel, grid)(*args, **kwargs)

        return launch

    with ExitStack() as stack:
        stack.enter_context(patch.object(interpreter.InterpretedFunction, "__getitem__", unseen))
        ours = [module for name, module in sys.modules.items() if name.startswith("genarm_fast.kernels")]
        for module, check in ((m, c) for m in ours for c in ("check_cache", "check_lanes") if hasattr(m, c)):
            stack.enter_context(patch.object(module, check, lambda *_: None))
        stack.enter_context(_Calls())
        stack.enter_context(_Operations(masks))
        yield


@contextmanager
def between_canaries(masks=False):
    """Yield canaries that `embed` tensors. Memory that a launcher allocates gets canaries too, and host reads raise."""
    canaries = Canaries()
    allocated = patch.object(torch, "empty", canaries.allocate)
    with allocated, patch.object(torch, "empty_like", canaries.allocate_like), no_reads(masks):
        yield canaries
    assert canaries.untouched()


def _as_float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)


def _dot(builder, a, b, sums, precision, imprecise):
    """Compute tl.dot. The interpreter's own version multiplies the integers that store bfloat16 numbers."""
    product = numpy.matmul(_as_float32(a), _as_float32(b), dtype=sums.data.dtype)
    return interpreter.TensorHandle(product + sums.data, sums.dtype.scalar)


@contextmanager
def bfloat16_products():
    with patch.object(interpreter.InterpreterBuilder, "create_dot", _dot):
        yield
