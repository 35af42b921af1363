"""Choose the implementation that serves a call, for all ops."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from operator import attrgetter
from typing import Any, TypeVar

from torch import is_grad_enabled
from torch.compiler import is_compiling

from . import _native

GPUS = ("cuda", "xpu")  # PyTorch names ROCm's devices cuda, too
requires_grad = attrgetter("requires_grad")
Result = TypeVar("Result")


def on_cpu(tensor: Any) -> bool:
    """Whether a tensor is on the CPU. True for other objects too, which the implementation for the CPU then refuses."""
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
    """Return a function that takes the op's arguments by position and calls the first implementation that serves.

    Every implementation takes the same arguments by position. The first argument is a tensor, and its device decides.

    pytorch: the reference, or PyTorch code with the same results. It serves every call that no other one serves.
    check: raises TypeError or ValueError for arguments that no implementation may take.
    cpu: the C++ core's function. It checks all arguments itself, which costs less than checks in Python. It returns
        None for arguments that have to be converted or refused.
    convert: takes checked arguments and returns them in the form that `cpu` takes, or None if they are not on the CPU.
    triton: the launcher, for tensors on a GPU. It returns None for dtypes that its kernels do not read.
    known: a launcher like `triton` that runs before any check. It returns the result of a call that resembles an
        earlier one, and None for other arguments.
    custom_op: the node in the graphs of torch.compile and torch.export, which checks what can be traced. Without one,
        the compiler traces `pytorch` and fuses it with its neighbours.
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
    """Return the reference with the op's checks before it. Users may pass its arguments by name or by position."""

    @wraps(reference)
    def run(*args: Any, **kwargs: Any) -> Result:
        check(*args, **kwargs)
        return reference(*args, **kwargs)

    return run
