"""The Triton kernel of gated_mul and silu_mul under TRITON_INTERPRET=1. test_triton.py runs it in a new process."""

import pytest
import torch
from interpreter import between_canaries
from stacked_products import stacked

from genarm_fast.kernels import silu_mul_reference
from genarm_fast.kernels.gated_mul.reference import ACTIVATIONS, specification
from genarm_fast.kernels.gated_mul.triton import launch, launch_silu_mul

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 4e-2}  # bfloat16: the interpreter truncates


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("index", [(), (-1, 1, 0)])
@pytest.mark.parametrize(("width", "rank"), [(80, 3), (600, 16)])
def test_gated_mul(width, rank, index, dtype, activation):
    y, lanes, merged = stacked((width, width), index, rows=6, rank=rank, dtype=dtype)
    with between_canaries() as canaries:
        embedded = [canaries.embed(tensor) for tensor in lanes or ()] or [None, None]
        got = launch(canaries.embed(y).view(3, 2, -1), activation, *embedded)
    gate, up = merged.view(3, 2, -1).split(width, -1)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(got.double(), ACTIVATIONS[activation](gate) * up, **tolerance)
    torch.testing.assert_close(got, specification(y.view(3, 2, -1), activation, *(lanes or (None, None))), **tolerance)


def test_extremes():
    gate = torch.tensor([0.0, -0.0, 200.0, -200.0, 30.0, -30.0, torch.nan])
    for activation, function in ACTIVATIONS.items():
        got = launch(torch.cat([gate, torch.ones(7)]).view(1, -1), activation, None, None)
        torch.testing.assert_close(got[0], function(gate), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 600)])
def test_silu_mul(shape):
    gate, up = torch.randn(shape), torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    with between_canaries() as canaries:
        got = launch_silu_mul(canaries.embed(gate), up)
    torch.testing.assert_close(got, silu_mul_reference(gate, up), rtol=1e-5, atol=1e-6)


def test_what_silu_mul_leaves_to_the_reference():
    gate = torch.randn(2, 4)
    for one, other in ((gate, gate[0]), (gate.double(), gate.double()), (gate, gate.half()), (gate[:0], gate[:0])):
        assert launch_silu_mul(one, other) is None
    assert launch_silu_mul(gate[0, 0], gate[0, 0]) is None
    assert launch(gate.double(), "silu", None, None) is None
    assert launch(gate[:0], "silu", None, None).shape == (0, 2)
