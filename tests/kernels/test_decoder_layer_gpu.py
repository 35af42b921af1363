"""The small Triton kernels of a decoder layer on a CUDA device agree with PyTorch on the CPU."""

import pytest
import torch
from stacked_products import stacked

from genarm_fast.kernels import Lanes, add_rms_norm, gated_mul, rms_norm, rotary, rotary_append, silu_mul

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def cuda(value):
    if isinstance(value, Lanes):
        return Lanes(value.b.cuda(), value.adapters.cuda())
    return value.cuda() if isinstance(value, torch.Tensor) else value


def assert_same(op, *tensors, **options):
    """Compare the op on the GPU with the op on the CPU: its results, and the tensors that it writes in place."""
    moved = [cuda(tensor) for tensor in tensors]
    found = op(*moved, **{name: cuda(value) for name, value in options.items()})
    expected = op(*tensors, **options)
    tolerance = TOLERANCE[tensors[0].dtype]
    for got, wanted in zip((found, *moved), (expected, *tensors), strict=True):
        got = tuple(x.cpu() for x in got) if isinstance(got, tuple) else got.cpu()
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("index", [(), (-1, 1, 0)])
@pytest.mark.parametrize("width", [80, 896, 4096])
def test_norms(width, index, dtype):
    y, lanes, _ = stacked((width,), index, rows=6, rank=16, dtype=dtype)
    hidden, weight = torch.randn(6, width, dtype=dtype), torch.randn(width, dtype=dtype)
    assert_same(lambda h, y, w, **lanes: add_rms_norm(h, y, w, 1e-5, **lanes), hidden, y, weight, lanes=lanes)
    assert_same(lambda h, w: rms_norm(h, w, 1e-5, offset=1.0), hidden, weight)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("index", [(), (-1, 1, 0)])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gates(activation, index, dtype):
    y, lanes, _ = stacked((4864, 4864), index, rows=6, rank=8, dtype=dtype)
    assert_same(gated_mul, y, activation=activation, lanes=lanes)
    assert_same(silu_mul, *y[:, : 2 * 4864].split(4864, -1))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("index", [(), (-1, 1, 0)])
@pytest.mark.parametrize(("heads", "width", "norms"), [((32, 8), 128, False), ((14, 2), 64, True), ((4, 4), 80, True)])
def test_rotary_append(heads, width, norms, index, dtype):
    sizes = (heads[0] * width, heads[1] * width, heads[1] * width)
    y, lanes, _ = stacked(sizes, index, rows=6, rank=8, dtype=dtype)
    angle = 10 * torch.rand(3, 2, width)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    caches = [torch.zeros(4, heads[1], 20, width, dtype=dtype) for _ in range(2)]
    places = (torch.tensor([3, 0, 2]), torch.tensor([[4, 5], [0, 19], [7, 1]]))
    options = {"lanes": lanes, "bias": torch.randn(sum(sizes), dtype=dtype)}
    if norms:
        options |= {"query_norm": torch.randn(width, dtype=dtype), "key_norm": torch.randn(width, dtype=dtype)}
    assert_same(rotary_append, y.view(3, 2, -1), cos, sin, *caches, *places, **options)
    query, key = (torch.randn(3, 2, each, width, dtype=dtype).transpose(1, 2) for each in heads)
    assert_same(rotary, query, key, cos, sin)
