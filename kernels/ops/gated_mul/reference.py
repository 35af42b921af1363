"""The middle of a gated MLP over the stacked product of its first linears, [gate | up].

    z = act(gate) · up        silu(x) = x / (1 + exp(-x)),  gelu(x) = x Φ(x)

act(gate) is rounded before it is multiplied. Where there are LoRA lanes, their B completes the product first
(`_product.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional

from .._product import check_lanes, product

ACTIVATIONS: dict[
    str, Callable[[Tensor], Tensor]
] = {  # in the order of the constants in triton.py; gelu_tanh is transformers' gelu_pytorch_tanh
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def outputs(y: Tensor, b: Tensor | None) -> int:
    """Return the number of columns of gate and up together."""
    return b.shape[-1] if b is not None else y.shape[-1] if y.ndim else 0


def check(y: Tensor, activation: str, b: Tensor | None, index: Tensor | None) -> None:
    """Check the arguments of gated_mul. Raises TypeError or ValueError that names the argument."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    if not y.dtype.is_floating_point:
        raise TypeError(f"y of dtype {y.dtype}: expected floating point")
    out = outputs(y, b)
    if not out or out % 2:
        raise ValueError(f"{out} columns of gate and up: expected an even number")
    check_lanes(y, out, 2, b, index)


def specification(y: Tensor, activation: str, b: Tensor | None, index: Tensor | None) -> Tensor:
    """The specification of `gated_mul`."""
    width = outputs(y, b) // 2
    gate, up = product(y, (width, width), None, b, index).split(width, -1)
    return ACTIVATIONS[activation](gate) * up
