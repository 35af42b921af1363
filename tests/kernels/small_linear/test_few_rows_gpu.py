"""Products of few rows on a CUDA device: the kernel agrees with cuBLAS, and a measurement chooses between them."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from genarm_fast.models import few_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize(("outputs", "width"), [(28672, 4096), (576, 1536), (100, 200)])
def test_as_cublas(outputs, width, rows):
    x, weight, bias = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((rows, width), (outputs, width), outputs)
    )
    expected = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(few_rows.few_rows_linear(x, weight, bias).double(), expected, rtol=2**-7, atol=0.1)
    assert functional.linear(x, weight, bias).shape == expected.shape


def test_measured_in_graphs(monkeypatch):
    monkeypatch.setattr(few_rows, "measured", {})
    weights = [torch.randn(576, 1536, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    products = [SimpleNamespace(weight=weight, bias=None, kernel_row_counts=frozenset()) for weight in weights]
    said = few_rows.choose(products)
    assert said.startswith("of 5 shapes")
    assert not [found.why for found in few_rows.measured.values() if found.why]
    assert all(0 < found.cublas < 1e-3 and 0 < found.few_rows < 1e-3 for found in few_rows.measured.values())
