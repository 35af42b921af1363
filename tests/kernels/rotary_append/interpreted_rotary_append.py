"""The Triton kernels of rotary and rotary_append under TRITON_INTERPRET=1. test_triton.py runs this file."""

import pytest
import torch
from interpreter import between_canaries
from stacked_products import stacked

from genarm_fast.kernels import rotary_reference
from genarm_fast.kernels.rotary.triton import launch as launch_rotary
from genarm_fast.kernels.rotary_append.reference import specification
from genarm_fast.kernels.rotary_append.triton import launch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 6e-2}  # bfloat16: the interpreter truncates


def angles(rows, block, width, dtype):
    turned = 10 * torch.rand(rows, block, width)
    return turned.cos().to(dtype), turned.sin().to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("index", [(), (-1, 1, 0)])
@pytest.mark.parametrize("parts", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("widths", "heads"), [((16, 16), (4, 2)), ((10, 7), (3, 3))])
def test_rotary_append(widths, heads, parts, index, dtype):
    """Three rows of two tokens are in slots 3, 0 and 2."""
    sizes = (heads[0] * widths[0], heads[1] * widths[0], heads[1] * widths[1])
    y, lanes, merged = stacked(sizes, index, rows=6, dtype=dtype)
    cos, sin = angles(1 if parts == "llama" else 3, 2, widths[0], dtype)
    caches = [torch.randn(4, heads[1], 9, width, dtype=dtype) for width in widths]
    slots, positions = torch.tensor([3, 0, 2]), torch.tensor([[4, 5], [0, 8], [7, 1]])
    norms = [torch.randn(widths[0], dtype=dtype) for _ in range(2)] if parts == "qwen3" else [None, None]
    bias = torch.randn(sum(sizes), dtype=dtype) if parts == "qwen2" else None

    exact = [cache.double() for cache in caches]
    plain = merged.view(3, 2, -1) + (0 if bias is None else bias.double())
    rest = [None if norm is None else norm.double() for norm in norms]
    expected = specification(plain, cos.double(), sin.double(), *exact, slots, positions, *rest, 1e-6, None, None, None)
    with between_canaries() as canaries:
        embedded = [canaries.embed(tensor) for tensor in lanes or ()] or [None, None]
        keys = canaries.embed(caches[0]).transpose(1, 2).contiguous().transpose(1, 2)
        values = canaries.embed(caches[1])
        got = launch(
            canaries.embed(y).view(3, 2, -1), canaries.embed(cos), canaries.embed(sin), keys, values,
            canaries.embed(slots), canaries.embed(positions), *norms, 1e-6, bias, *embedded,
        )  # fmt: skip
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for found, wanted in zip((got, keys, values), (expected, *exact), strict=True):
        torch.testing.assert_close(found.double(), wanted, **tolerance)
    own = [cache.clone() for cache in caches]
    arguments = (y.view(3, 2, -1), cos, sin, *own, slots, positions, *norms, 1e-6, bias, *(lanes or (None, None)))
    torch.testing.assert_close([specification(*arguments), *own], [got, keys, values], **tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("width", "rows"), [(2, 1), (80, 2)])
def test_rotary(width, rows, dtype):
    query, key = (torch.randn(2, 3, heads, width, dtype=dtype).transpose(1, 2) for heads in (4, 1))
    cos, sin = angles(rows, 3, width, dtype)
    with between_canaries() as canaries:
        found = launch_rotary(query, canaries.embed(key), canaries.embed(cos), sin, 1)
    expected = rotary_reference(query, key, cos, sin)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_what_rotary_leaves_to_the_reference():
    query, (cos, sin) = torch.randn(2, 3, 4, 8), angles(2, 4, 8, torch.float32)
    assert launch_rotary(query, query, cos, sin, 2) is None
    assert launch_rotary(query, query, cos[..., :4], sin[..., :4], 1) is None
    assert launch_rotary(query.double(), query.double(), cos.double(), sin.double(), 1) is None
    assert launch_rotary(query, query[:, :, :3], cos, sin, 1) is None
