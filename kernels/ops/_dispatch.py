"""Which implementation of an op serves a call: decided here, for all ops."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from operator import attrgetter
from typing import Any, TypeVar

from torch import is_grad_enabled
from torch.compiler import is_compiling

from . import _native

GPUS = ("cuda", "xpu")  # PyTorch calls ROCm's devices cuda, too
requires_grad = attrgetter("requires_grad")
Result = TypeVar("Result")


def on_cpu(tensor: Any) -> bool:
    """Also for what is no tensor: an implementation for the CPU finds out."""
    return getattr(tensor, "is_cpu", True)


def dispatcher(
    pytorch: Callable[..., Result],
    *,
    check: Callable[..., None] | None = None,
    cpu: Callable[..., Result | None] | None = None,
    convert: Callable[..., tuple[Any, ...] | None] | None = None,
    triton: Callable[..., Result | None] | None = None,
    known: Callable[..., Result | None] | None = None,
    custom_op: Callable[..., Result] | None = None,
    differentiable: int = 0,
) -> Callable[..., Result]:
    """A function that takes the op's arguments by position and calls the first implementation that serves.

    Every implementation takes the same arguments by position; the first argument is a tensor, whose device counts.

    pytorch: the reference, or PyTorch code that serves as well. It serves everything that the others leave.
    check: raises TypeError or ValueError for arguments that no implementation may take.
    cpu: the C++ core's function. It makes all checks itself, which costs less than checks in Python, and returns None
        for arguments that it does not take as they stand.
    convert: checked arguments as `cpu` takes them, or None if they are not for the CPU.
    triton: the launcher, for tensors on a GPU; None for dtypes that it does not take.
    known: as `triton`, before any check: the result of a call like an earlier one, or None for other arguments.
    custom_op: the node in the graphs of torch.compile and torch.export, which checks what can be traced. Without one,
        the compiler traces `pytorch`, and fuses it with its neighbours.
    differentiable: the number of leading tensors whose gradient only `pytorch` computes.
    """

    def checked(*arguments: Any) -> Result:
        if check is not None:
            check(*arguments)
        return pytorch(*arguments)

    def prepared(*arguments: Any) -> Result:
        out = None
        if check is not None:
            check(*arguments)
        if triton is not None and arguments[0].device.type in GPUS:
            out = triton(*arguments)
        elif cpu is not None and convert is not None and _native.core is not None:
            converted = convert(*arguments)
            out = None if converted is None else cpu(*converted)
        return pytorch(*arguments) if out is None else out

    def run(*arguments: Any) -> Result:
        if differentiable and is_grad_enabled() and any(map(requires_grad, arguments[:differentiable])):
            return checked(*arguments)
        if is_compiling():
            return checked(*arguments) if custom_op is None else custom_op(*arguments)
        if known is not None and not on_cpu(arguments[0]):
            out = known(*arguments)
            if out is not None:
                return out
        elif cpu is not None and _native.core is not None:
            out = cpu(*arguments)
            if out is not None:
                return out
        return prepared(*arguments)

    return run


def checked_reference(check: Callable[..., None], reference: Callable[..., Result]) -> Callable[..., Result]:
    """The reference as users call it, by name or by position: after the op's checks."""

    @wraps(reference)
    def run(*args: Any, **kwargs: Any) -> Result:
        check(*args, **kwargs)
        return reference(*args, **kwargs)

    return run
