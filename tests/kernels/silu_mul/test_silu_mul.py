"""silu_mul agrees with PyTorch."""

import pytest
import torch
from torch.nn import functional

from genarm_fast.kernels import _native, silu_mul

ISAS = _native.core.instruction_sets() if _native.core else []


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 17), (2, 3, 1536), (0, 4)])
def test_values(isa, dtype, shape):
    _native.core.use(isa)
    try:
        generator = torch.Generator().manual_seed(0)
        gate, up = (20 * torch.randn(*shape, generator=generator)).to(dtype), torch.randn(*shape, generator=generator)
        up = up.to(dtype)
        got = silu_mul(gate, up)
        assert got.dtype == dtype
        exact = functional.silu(gate.double()) * up.double()
        # bfloat16 rounds twice, by half an ulp each time.
        torch.testing.assert_close(got.double(), exact, rtol=5e-6 if dtype == torch.float32 else 2**-7, atol=1e-35)
        if gate.numel():
            assert torch.equal(silu_mul(gate[-1:], up[-1:]), got[-1:])  # the rows before it do not matter
    finally:
        _native.core.use(ISAS[0])


def test_extremes():
    gate = torch.tensor([0.0, -0.0, 200.0, -200.0, torch.inf, torch.nan])
    got = silu_mul(gate, torch.ones(6))
    torch.testing.assert_close(got, functional.silu(gate), rtol=1e-6, atol=1e-35, equal_nan=True)


def test_what_the_core_does_not_take():
    gate, up = torch.randn(2, 4, 6)
    assert torch.equal(silu_mul(gate.half(), up.half()), functional.silu(gate.half()) * up.half())
    torch.testing.assert_close(silu_mul(gate.T, up.T), functional.silu(gate.T) * up.T)
    torch.testing.assert_close(silu_mul(gate, up[0]), functional.silu(gate) * up[0])
    for zeros in (torch._efficientzerotensor(4, 16), torch.zeros(4, 16)):  # the first has no memory
        assert torch.equal(silu_mul(zeros, zeros), torch.zeros(4, 16))
    assert torch.equal(torch.func.functionalize(silu_mul)(gate, up), functional.silu(gate) * up)
    gate.requires_grad_()
    silu_mul(gate, up).sum().backward()
    assert gate.grad is not None
