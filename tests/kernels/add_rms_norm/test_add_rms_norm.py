"""add_rms_norm in PyTorch agrees with merged weights in float64, and refuses wrong arguments."""

import pytest
import torch
from stacked_products import stacked

from genarm_fast.kernels import Lanes, add_rms_norm, rms_norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", [(), (1, -1, 0), (0,)])
def test_values(index, dtype):
    y, lanes, merged = stacked((20,), index, rows=6, dtype=dtype)
    hidden, weight = torch.randn(6, 20, dtype=dtype), torch.randn(20, dtype=dtype)
    total, normed = add_rms_norm(hidden, y, weight, 1e-5, offset=1.0, lanes=lanes)
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-13)
    torch.testing.assert_close(total.double(), hidden.double() + merged, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(normed, rms_norm(total, weight, 1e-5, offset=1.0))


def test_a_gradient_is_made():
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((3, 8), (3, 8), (8,))]
    total, normed = add_rms_norm(*leaves, 1e-5)
    (total + normed).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


def faulty(**changes):
    y, lanes, _ = stacked((8,), (0, 1), rows=4)
    given = {
        "hidden": torch.zeros(4, 8),
        "y": y,
        "weight": torch.ones(8),
        "b": lanes.b,
        "index": lanes.adapters,
    } | changes
    return add_rms_norm(given["hidden"], given["y"], given["weight"], 1e-5, lanes=Lanes(given["b"], given["index"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(7)}, r"weight of shape \(7,\): expected \(8,\)"),
        ({"y": torch.zeros(3, 14)}, r"y of shape \(3, 14\): expected \(4, 'out'\)"),
        ({"y": torch.zeros(4, 13)}, r"y of shape \(4, 13\): expected \[..., 8 \+ 6\]"),
        ({"y": torch.zeros(4, 14).half()}, r"y of dtype torch.float16: expected torch.float32"),
        ({"b": torch.zeros(2, 3, 9)}, r"lanes.b of shape \(2, 3, 9\): expected \[n, r, 8\]"),
        ({"b": torch.zeros(2, 3, 8).half()}, r"lanes.b of torch.float16"),
        (
            {"index": torch.zeros(3, dtype=torch.int64)},
            r"lanes.adapters of shape \(3,\): .* a divisor of 4",
        ),
        ({"index": torch.zeros(2)}, r"lanes.adapters of torch.float32"),
        ({"index": torch.tensor([0, 2])}, r"lanes.adapters from 0 to 2: expected -1..1"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        faulty(**changes)
    faulty()
