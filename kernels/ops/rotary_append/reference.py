"""Turn the stacked product of query, key and value into the inputs of attention, in one pass.

    q, k, v = y + bias        q, k = norms of their heads, where a model has them        q, k = rotated by cos and sin
    k, v → their entries of the cache                                                    q → the result

Where there are LoRA lanes, their B completes the product first (`_product.py`). Llama and Mistral only need the
rotation, Qwen2 also biases, and Qwen3 norms of queries and keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._product import check_lanes, product
from ..ragged_attention.arguments import check_cache
from ..ragged_attention.reference import append_specification
from ..rms_norm.reference import rms_norm_reference
from ..rotary.reference import rotary_reference


def query_heads(y: Tensor, keys: Tensor, values: Tensor, b: Tensor | None) -> tuple[int, int]:
    """Return the number of query heads in the product, and the number of columns left over, which should be 0."""
    out = b.shape[-1] if b is not None else y.shape[-1]
    heads, width = keys.shape[1], keys.shape[3]
    rest = out - heads * (width + values.shape[3])
    return (rest // width, rest % width) if width else (0, 1)  # divmod does not take symbolic sizes


def check(
    y: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    bias: Tensor | None,
    b: Tensor | None,
    index: Tensor | None,
) -> None:
    """Check the arguments of rotary_append. Raises TypeError or ValueError that names the argument."""
    if y.ndim != 3:
        raise ValueError(f"y of shape {tuple(y.shape)}: expected [N, q, columns]")
    rows, block, _ = y.shape
    check_cache(keys, values, slots, positions, rows, block)
    width = keys.shape[3]
    if width % 2 or not width:
        raise ValueError(f"keys of shape {tuple(keys.shape)}: expected an even width, which has two halves to rotate")
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.shape not in ((rows, block, width), (1, block, width)):
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: expected [{rows} or 1, {block}, {width}]")
    heads, left = query_heads(y, keys, values, b)
    if heads < 1 or left:
        cache = f"{keys.shape[1]} heads of {width} and {values.shape[3]}"
        raise ValueError(f"y of shape {tuple(y.shape)}: expected columns of query heads of {width}, and of {cache}")
    out = heads * width + keys.shape[1] * (width + values.shape[3])
    check_lanes(y, out, 3, b, index)
    if (query_norm is None) != (key_norm is None):
        raise ValueError("query_norm and key_norm: expected both or neither")
    shapes = {"query_norm": (query_norm, (width,)), "key_norm": (key_norm, (width,)), "bias": (bias, (out,))}
    for name, (given, shape) in shapes.items():
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} of shape {tuple(given.shape)}: expected {shape}")
    others = {"cos": cos, "sin": sin, "keys": keys, "values": values, "slots": slots, "positions": positions}
    for name, one in (others | {name: given for name, (given, _) in shapes.items()}).items():
        dtype = torch.int64 if name in ("slots", "positions") else y.dtype
        if one is not None and (one.device != y.device or one.dtype != dtype):
            raise TypeError(f"{name} of {one.dtype} on {one.device}: expected {dtype} on {y.device}, where y is")


def specification(
    y: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    bias: Tensor | None,
    b: Tensor | None,
    index: Tensor | None,
) -> Tensor:
    """The specification of `rotary_append`."""
    rows, block, _ = y.shape
    heads, kv_heads, width = query_heads(y, keys, values, b)[0], keys.shape[1], keys.shape[3]
    sizes = ((heads, width), (kv_heads, width), (kv_heads, values.shape[3]))
    widths = [each * size for each, size in sizes]
    parts = product(y, widths, bias, b, index).split(widths, -1)
    query, key, value = (part.reshape(rows, block, *size) for part, size in zip(parts, sizes))
    if query_norm is not None and key_norm is not None:
        query, key = rms_norm_reference(query, query_norm, eps), rms_norm_reference(key, key_norm, eps)
    query, key = rotary_reference(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    append_specification(keys, values, key, value.transpose(1, 2), slots, positions)
    return query.transpose(1, 2).contiguous()
