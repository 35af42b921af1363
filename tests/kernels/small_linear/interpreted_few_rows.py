"""The Triton kernel for products of few rows under TRITON_INTERPRET=1. test_triton.py runs it in a new process."""

import pytest
import torch
from interpreter import between_canaries, bfloat16_products

from genarm_fast.kernels.small_linear import triton as kernels

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # bfloat16: the interpreter truncates


def check(rows, outputs, width, dtype, biased=False, shape=None):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(each, generator=generator).to(dtype) for each in ((rows, width), (outputs, width), outputs)
    )
    with between_canaries() as canaries, bfloat16_products():
        given = canaries.embed(x).view(shape or x.shape), canaries.embed(weight)
        got = kernels.launch(*given, canaries.embed(bias) if biased else None)
    assert got.shape == (*(shape or x.shape)[:-1], outputs)
    assert got.dtype == dtype
    expected = x.double() @ weight.double().T + (bias.double() if biased else 0)
    tolerance = TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(got.double().view(rows, outputs), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("programs", "least"), [(1, 1), (12, 64)])
def test_against_float64(programs, least, biased, dtype, monkeypatch):
    """Outputs and inputs do not fill their last block. There are one or several splits; the last may be shorter."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    monkeypatch.setattr(kernels, "LEAST_CHUNK", least)
    monkeypatch.setattr(kernels, "STEP_BYTES", 64)
    splits = kernels.cut(40, 200, 64 // dtype.itemsize)[1]
    assert splits == 1 if programs == 1 else splits > 1
    check(3, 40, 200, dtype, biased)


@pytest.mark.parametrize("rows", [1, 16])
def test_rows(rows):
    check(rows, 33, 64, torch.float32)


def test_lanes_and_blocks_of_tokens():
    check(6, 20, 32, torch.float32, shape=(3, 2, 32))


def test_a_transposed_weight():
    x, weight = torch.randn(2, 20), torch.randn(20, 30).T
    torch.testing.assert_close(kernels.launch(x, weight), x @ weight.T, rtol=1e-4, atol=1e-4)


def test_what_is_left_to_cublas():
    x = torch.randn(17, 32)
    assert kernels.launch(x, x) is None
    assert kernels.launch(x[:0], x) is None
    assert kernels.launch(x[:1].double(), x.double()) is None
    assert kernels.launch(x[:1].half(), x) is None


@pytest.mark.parametrize(
    ("outputs", "width"), [(6144, 4096), (128256, 4096), (576, 576), (576, 1536), (16, 100), (4096, 14336)]
)
def test_cuts_cover_all_inputs(outputs, width):
    block, splits, chunk = kernels.cut(outputs, width, 128)
    assert (splits - 1) * chunk < width <= splits * chunk
    assert splits == 1 or (chunk % 128 == 0 and splits * -(-outputs // block) <= kernels.PROGRAMS)
