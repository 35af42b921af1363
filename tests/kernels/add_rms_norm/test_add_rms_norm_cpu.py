"""add_rms_norm in C++ gives the bits of its reference, and leaves some arguments to PyTorch."""

import pytest
import torch

from genarm_fast.kernels import _native, add_rms_norm
from genarm_fast.kernels.add_rms_norm import cpu
from genarm_fast.kernels.add_rms_norm.reference import specification

pytestmark = pytest.mark.skipif(_native.core is None, reason="needs the C++ core")


def tensors(shape, dtype):
    random = torch.Generator().manual_seed(shape[-1])
    return [torch.randn(size, generator=random).to(dtype) for size in (shape, shape, shape[-1:])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8,), (1, 1, 576), (3, 2, 100), (0, 64), (5, 4099)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_bits_of_the_reference(isa, dtype, shape, offset):
    given = tensors(shape, dtype)
    before = given[0].clone()
    ours = cpu.run(*given, 1e-5, offset, None, None)
    assert all(map(torch.equal, ours, specification(*given, 1e-5, offset, None, None)))
    assert torch.equal(given[0], before)
    if given[0].numel():  # negative control: another eps gives another norm
        assert not torch.equal(ours[1], specification(*given, 0.5, offset, None, None)[1])


def test_strides_and_parameters_are_converted():
    hidden, y, weight = tensors((4, 6, 40), torch.float32)
    expected = add_rms_norm(hidden, y, weight, 1e-5)
    turned = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    negative = torch.complex(torch.zeros_like(y), -y).conj().imag
    found = add_rms_norm(turned, negative, torch.nn.Parameter(weight, requires_grad=False), 1e-5)
    assert all(map(torch.equal, found, expected))


def test_what_is_left_to_pytorch():
    hidden, y, weight = tensors((2, 8), torch.float32)
    lanes = torch.zeros(1, 1, 8), torch.tensor([0])
    assert cpu.run(hidden, y, weight, 1e-5, 0.0, *lanes) is None
    for given in ((hidden.half(), y.half(), weight.half()), (hidden, y.double(), weight), (hidden, y[:1], weight)):
        assert cpu.run(*given, 1e-5, 0.0, None, None) is None
    assert cpu.run(hidden.t().contiguous().t(), y, weight, 1e-5, 0.0, None, None) is None
    with pytest.raises(TypeError, match="5 arguments: expected 7"):
        cpu.run(hidden, y, weight, 1e-5, 0.0)
