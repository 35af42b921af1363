"""rotary_append in C++ gives the bits of its reference, and leaves some arguments to PyTorch."""

import pytest
import torch

from genarm_fast.kernels import _native, rotary_append
from genarm_fast.kernels.rotary_append import cpu
from genarm_fast.kernels.rotary_append.reference import specification

pytestmark = pytest.mark.skipif(_native.core is None, reason="needs the C++ core")


def arguments(dtype, *, block=2, heads=6, kv_heads=2, width=16, value_width=8, norms=False, angles=3):
    """Return arguments of three rows with different slots and positions, and caches whose values must not change."""
    random = torch.Generator().manual_seed(block * width)

    def normal(*shape):
        return torch.randn(shape, generator=random).to(dtype)

    y = normal(3, block, heads * width + kv_heads * (width + value_width))
    caches = normal(4, kv_heads, 9, width), normal(4, kv_heads, 9, value_width)
    slots, positions = torch.tensor([2, 0, 3]), torch.tensor([[0], [4], [2]]) + torch.arange(block)
    weights = (normal(width), normal(width)) if norms else (None, None)
    return [y, normal(angles, block, width), normal(angles, block, width), *caches, slots, positions, *weights, 1e-6]


def both(given):
    """Return queries, keys and values from C++, and those from the reference."""
    ours, theirs = (
        [tensor.clone() if index in (3, 4) else tensor for index, tensor in enumerate(given)] for _ in range(2)
    )
    query = cpu.run(*ours, None, None, None)
    assert query is not None
    return (query, *ours[3:5]), (specification(*theirs, None, None, None), *theirs[3:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("shape", [(6, 2, 16, 8), (1, 1, 2, 1), (9, 3, 64, 64), (4, 4, 20, 20)])
@pytest.mark.parametrize("norms", [False, True])
def test_bits_of_the_reference(isa, dtype, block, shape, norms):
    heads, kv_heads, width, value_width = shape
    norms &= width >= 8  # PyTorch sums fewer squares in another order, see rms_norm
    sizes = {"heads": heads, "kv_heads": kv_heads, "width": width, "value_width": value_width}
    ours, theirs = both(arguments(dtype, block=block, norms=norms, **sizes))
    assert ours[0].is_contiguous()
    assert all(map(torch.equal, ours, theirs))


def test_strides(isa):
    given = arguments(torch.bfloat16, angles=1)
    expected, _ = both(given)
    wide = torch.zeros(3, 2, 2 * given[0].shape[2], dtype=torch.bfloat16)
    wide[..., 1 : given[0].shape[2] + 1] = given[0]
    given[0] = wide[..., 1 : given[0].shape[2] + 1]
    given[1] = given[1].expand(3, -1, -1)
    given[3] = given[3].transpose(1, 2).contiguous().transpose(1, 2)
    given[5] = torch.stack([given[5], given[5]], 1)[:, 0]
    ours, theirs = both(given)
    assert all(map(torch.equal, ours, theirs))
    assert all(map(torch.equal, ours, expected))


def test_a_weight_decides():
    """Negative control of the norms: another weight gives another result."""
    given = arguments(torch.float32, norms=True)
    ours, _ = both(given)
    given[8] = given[8] + 1
    changed, _ = both(given)
    assert [torch.equal(*pair) for pair in zip(ours, changed)] == [True, False, True]


def test_parameters_and_negative_views_are_converted():
    given = arguments(torch.float32, norms=True)
    expected, _ = both(given)
    negative = torch.complex(torch.zeros_like(given[0]), -given[0]).conj().imag
    assert negative.is_neg()
    weights = [torch.nn.Parameter(weight, requires_grad=False) for weight in given[7:9]]
    query = rotary_append(negative, *given[1:7], query_norm=weights[0], key_norm=weights[1], eps=given[9])
    assert all(map(torch.equal, (query, *given[3:5]), expected))


@pytest.mark.parametrize(("which", "message"), [(5, r"slots\[2\] = 4: expected 0..3"), (6, r"positions\[0, 1\] = 9")])
def test_nothing_is_written_where_a_place_is_wrong(which, message):
    given = arguments(torch.float32)
    given[which] = given[which].clone()
    given[which].view(-1)[2 if which == 5 else 1] = 4 if which == 5 else 9
    before = [cache.clone() for cache in given[3:5]]
    with pytest.raises(ValueError, match=message):
        rotary_append(*given[:7])
    assert all(map(torch.equal, before, given[3:5]))


def test_what_is_left_to_pytorch():
    given = arguments(torch.float32)
    bias, lanes = torch.zeros(given[0].shape[2]), torch.zeros(1, 1, given[0].shape[2])
    assert cpu.run(*given, bias, None, None) is None
    assert cpu.run(*given, None, lanes, torch.tensor([0])) is None
    for index, tensor in ((0, given[0].half()), (0, given[0][..., :-1]), (1, given[1][:2]), (3, given[3].half())):
        assert cpu.run(*given[:index], tensor, *given[index + 1 :], None, None, None) is None
    assert cpu.run(*given[:7], torch.ones(16), None, 1e-6, None, None, None) is None
    with pytest.raises(TypeError, match="12 arguments: expected 13"):
        cpu.run(*given, None, None)
