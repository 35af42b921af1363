"""The Triton kernel of rms_norm and add_rms_norm under TRITON_INTERPRET=1. test_triton.py runs it in a new process."""

import pytest
import torch
from interpreter import between_canaries
from stacked_products import stacked

from genarm_fast.kernels import rms_norm_reference
from genarm_fast.kernels.add_rms_norm.reference import specification
from genarm_fast.kernels.rms_norm.triton import launch, run

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-2}  # bfloat16: the interpreter truncates


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("width", [1, 80, 600])
def test_rms_norm(width, offset, dtype):
    x, weight = 3 * torch.randn(2, 3, width, dtype=dtype), torch.randn(width, dtype=dtype)
    with between_canaries() as canaries:
        got = launch(canaries.embed(x), canaries.embed(weight), 1e-5, offset)
    expected = rms_norm_reference(x, weight, 1e-5, offset)
    assert got.shape == x.shape
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("index", [(), (-1, 1, 0), (1,), (0, -1, -1, 1, 0, 1)])
@pytest.mark.parametrize(("width", "rank"), [(80, 3), (600, 16), (600, 1)])
def test_add_rms_norm(width, rank, index, dtype):
    y, lanes, merged = stacked((width,), index, rows=6, rank=rank, dtype=dtype)
    hidden, weight = torch.randn(3, 2, width, dtype=dtype), torch.randn(width, dtype=dtype)
    with between_canaries() as canaries:
        embedded = [canaries.embed(tensor) for tensor in lanes or ()] or [None, None]
        total, normed = run(hidden, canaries.embed(y).view(3, 2, -1), weight, 1e-5, 0.0, *embedded)
    assert total.dtype == normed.dtype == dtype
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(total.double(), hidden.double() + merged.view(3, 2, -1), **tolerance)
    torch.testing.assert_close(normed, rms_norm_reference(total, weight, 1e-5), **tolerance)
    expected = specification(hidden, y.view(3, 2, -1), weight, 1e-5, 0.0, *(lanes or (None, None)))
    torch.testing.assert_close((total, normed), expected, **tolerance)


def test_a_row_without_an_adapter_reads_no_shrunk_input():
    y, lanes, _ = stacked((20,), (-1, 0), rows=4)
    y[:2, 20:] = torch.nan
    total, _ = run(torch.zeros(4, 20), y, torch.ones(20), 1e-5, 0.0, *lanes)
    assert torch.equal(total[:2], y[:2, :20])
    assert total.isfinite().all()


def test_strides_and_no_rows():
    x, y = torch.randn(4, 50)[:, ::2], torch.randn(4, 60)[:, 10:35]
    weight = torch.randn(50)[::2]
    found = run(x, y, weight, 1e-5, 1.0)
    torch.testing.assert_close(found, specification(x, y, weight, 1e-5, 1.0, None, None), rtol=1e-5, atol=1e-5)
    assert run(x[:0], y[:0], weight, 1e-5, 0.0)[1].shape == (0, 25)


def test_other_dtypes_are_left_to_the_reference():
    x, weight = torch.randn(2, 8), torch.randn(8)
    assert launch(x.double(), weight.double(), 1e-5, 0.0) is None
    assert launch(x.bfloat16(), weight, 1e-5, 0.0) is None
