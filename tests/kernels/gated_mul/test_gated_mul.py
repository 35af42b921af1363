"""gated_mul in PyTorch agrees with merged weights in float64, and refuses wrong arguments."""

import pytest
import torch
from stacked_products import stacked
from torch.nn import functional

from genarm_fast.kernels import gated_mul, silu_mul
from genarm_fast.kernels.gated_mul.reference import ACTIVATIONS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", [(), (1, -1, 0)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values(activation, index, dtype):
    y, lanes, merged = stacked((20, 20), index, rows=6, dtype=dtype)
    gate, up = merged.split(20, -1)
    expected = {"silu": functional.silu, "gelu": functional.gelu}.get(
        activation, lambda x: functional.gelu(x, approximate="tanh")
    )(gate) * up
    got = gated_mul(y.view(2, 3, -1), activation=activation, lanes=lanes)
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-13)
    torch.testing.assert_close(got.double().view(6, 20), expected, rtol=tolerance, atol=tolerance)


def test_as_silu_mul():
    y = torch.randn(3, 32)
    torch.testing.assert_close(gated_mul(y), silu_mul(y[:, :16].contiguous(), y[:, 16:].contiguous()))


@pytest.mark.parametrize(
    ("y", "activation", "message"),
    [
        (torch.zeros(2, 7), "silu", "7 columns of gate and up: expected an even number"),
        (torch.zeros(2, 8), "relu", "activation='relu': expected one of silu, gelu, gelu_tanh"),
        (torch.zeros(2, 8, dtype=torch.int64), "silu", "y of dtype torch.int64: expected floating point"),
    ],
)
def test_what_is_refused(y, activation, message):
    with pytest.raises((TypeError, ValueError), match=message):
        gated_mul(y, activation=activation)
