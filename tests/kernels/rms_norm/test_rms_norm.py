"""rms_norm gives the bits of the modules that it replaces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from genarm_fast.kernels import _native, rms_norm, rms_norm_reference

ISAS = _native.core.instruction_sets() if _native.core else []
native = pytest.mark.skipif(not ISAS, reason="built without a compiler")
DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [1, 7, 64, 100, 576, 960, 1024, 2048, 3584, 5000, 16384]


def module(family, width, dtype):
    norm = family(width, eps=1e-5).to(dtype)
    norm.weight.data.copy_(torch.randn(width, generator=torch.Generator().manual_seed(1)))
    return norm.requires_grad_(False)


def inputs(width, dtype, rows=(2, 3)):
    return (3 * torch.randn(*rows, width, generator=torch.Generator().manual_seed(0))).to(dtype)


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("family", "offset"), [(LlamaRMSNorm, 0.0), (Gemma2RMSNorm, 1.0)])
def test_as_the_module(isa, dtype, width, family, offset):
    norm, x = module(family, width, dtype), inputs(width, dtype)
    got, expected = rms_norm(x, norm.weight.detach(), 1e-5, offset=offset), norm(x)
    assert got.dtype == dtype
    if width < 8:  # PyTorch sums less than a vector in another order
        torch.testing.assert_close(got, expected, rtol=5e-7 if dtype == torch.float32 else 2**-7, atol=1e-30)
    else:
        assert torch.equal(got, expected)


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 576, 2048])
def test_company_changes_no_bit(isa, dtype, width):
    x, weight = inputs(width, dtype, (9,)), inputs(width, dtype, ())
    together = rms_norm(x, weight, 1e-5)
    assert torch.equal(torch.stack([rms_norm(row.clone(), weight, 1e-5) for row in x]), together)


@native
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_fuzz(data):
    _native.core.use(data.draw(st.sampled_from(ISAS), "isa"))
    try:
        width, dtype = data.draw(st.integers(1, 3000), "width"), data.draw(st.sampled_from(DTYPES), "dtype")
        scale = data.draw(st.sampled_from([1e-6, 1.0, 1e4]), "scale")
        x = inputs(width, dtype, (data.draw(st.integers(0, 3), "rows"), 2)) * scale
        weight, offset = inputs(width, dtype, ()), data.draw(st.sampled_from([0.0, 1.0]), "offset")
        exact = rms_norm_reference(x.double(), weight.double(), 1e-6, offset=offset)
        got = rms_norm(x, weight, 1e-6, offset=offset)
        torch.testing.assert_close(got.double(), exact, rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)
    finally:
        _native.core.use(ISAS[0])


def test_what_the_core_does_not_take():
    """Tensors with strides, parameters, other dtypes and gradients give the reference's results."""
    weight = torch.nn.Parameter(torch.rand(8))
    turned = torch.randn(8, 3).T
    with torch.no_grad():
        assert torch.equal(rms_norm(turned, weight, 1e-6), rms_norm_reference(turned.contiguous(), weight, 1e-6))
        half = turned.half()
        assert torch.equal(rms_norm(half, weight.half(), 1e-6), rms_norm_reference(half, weight.half(), 1e-6))
        assert rms_norm(half, weight, 1e-6).dtype == torch.float32  # Llama promotes so
    x = torch.randn(3, 8, requires_grad=True)
    rms_norm(x, weight.detach(), 1e-6).sum().backward()
    assert x.grad is not None
    rms_norm(x.detach(), weight, 1e-6).sum().backward()
    assert weight.grad is not None
    with pytest.raises(ValueError, match=r"weight of shape \(8,\): expected \(7,\), the width of x"):
        rms_norm(torch.randn(2, 7), weight, 1e-6)
