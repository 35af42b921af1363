"""small_linear is within its rounding of float64. A row's bits do not depend on other rows, threads or ISA."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linears import normal
from torch._subclasses.fake_tensor import FakeTensorMode

from genarm_fast.kernels import Lora, SmallLinear, _native, small_linear

ISAS = [isa for isa in _native.core.instruction_sets() if isa != "baseline"] if _native.core else []
native = pytest.mark.skipif(not ISAS, reason="no C++ core, or no AVX2")


@pytest.fixture(params=ISAS)
def isa(request):
    _native.core.use(request.param)
    yield request.param
    _native.core.use(ISAS[0])


def reference(x, weight, bias=None, loras=()):
    """Return (exact result, Σ |terms| of the result) in float64."""
    flat = x.double().reshape(x.shape[:-1].numel(), x.shape[-1])
    exact, magnitude = flat @ weight.double().T, flat.abs() @ weight.double().abs().T
    for first, last, a, b, scale in loras:
        exact[first:last] += scale * (flat[first:last] @ a.double().T @ b.double())
        magnitude[first:last] += abs(scale) * (flat[first:last].abs() @ a.double().abs().T @ b.double().abs())
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    shape = (*x.shape[:-1], len(weight))
    return exact.reshape(shape), magnitude.reshape(shape)


def assert_exact(y, x, weight, bias=None, loras=()):
    """Allow one rounding to bfloat16, and the error of float32 sums of in / 16 terms for each lane and a few more."""
    exact, magnitude = reference(x, weight, bias, loras)
    ranks = sum(len(a) for _, _, a, _, _ in loras)
    bound = exact.abs() * 2.0**-8 + magnitude * 2.0**-24 * (x.shape[-1] / 16 + 2 * ranks + 12)
    assert y.shape == exact.shape
    assert y.dtype == x.dtype
    assert ((y.double() - exact).abs() <= bound).all()


@native
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 17), (1000, 577), (16, 32), (192, 576), (17, 1536), (1000, 31), (5, 0), (0, 5)]
)
def test_shapes(isa, shape):
    weight, bias = normal(*shape, seed=1), normal(shape[0], seed=2)
    for rows in [*range(10), 16, 33]:
        x = normal(rows, shape[1], seed=3)
        assert_exact(small_linear(x, weight), x, weight)
        assert_exact(small_linear(x, weight, bias), x, weight, bias)


@native
def test_bound_catches_a_lost_product():
    """Negative control: the bound fails if one output lacks its last input, or if sums are held in bfloat16."""
    x, weight = normal(4, 577), normal(64, 577, seed=1)
    wrong = weight.clone()
    wrong[5, -1] = 0
    with pytest.raises(AssertionError):
        assert_exact(small_linear(x, wrong), x, weight)
    halves = small_linear(x[:, :288], weight[:, :288].contiguous()) + small_linear(x[:, 288:], weight[:, 288:])
    with pytest.raises(AssertionError):
        assert_exact(halves, x, weight)


def near_the_smallest(*shape, seed):
    """Return bfloat16 numbers of all biased exponents from 0 (subnormal) to 70.

    Their products are below and above 2^-126, and some sums cancel.
    """
    bits = torch.randint(0, 71 << 7, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    signs = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.int32) << 15
    return (bits | signs).to(torch.uint16).view(torch.bfloat16)


@native
@pytest.mark.parametrize("rows", [1, 3, 8, 40])
def test_one_result_near_the_smallest_numbers(isa, rows):
    """All instruction sets give the first one's bits. Two FMAs equal vdpbf16ps only if they flush subnormal numbers."""
    x, weight = near_the_smallest(rows, 577, seed=rows), near_the_smallest(64, 577, seed=9)
    y = small_linear(x, weight)
    _native.core.use(ISAS[0])
    assert torch.equal(small_linear(x, weight), y)
    assert (y != 0).any()


@native
def test_subnormal_numbers_count_as_zeros(isa):
    """Subnormal inputs, weights, products and sums count as zeros. The caller's own arithmetic keeps such numbers."""
    smallest, tiny = 2.0**-126, 2.0**-130
    cases = [([tiny, 1], [2.0**20, 2], 2), ([2.0**20, 1], [tiny, 2], 2), ([2.0**-70, 0], [2.0**-70, 0], 0)]
    cases += [([2.0**-60, 0], [2.0**-66, 0], smallest), ([1.5 * smallest, smallest], [1, -1], 0)]
    for x, weight, right in cases:
        y = small_linear(torch.tensor([x]).bfloat16(), torch.tensor([weight]).bfloat16())
        assert y.item() == right, (x, weight)
    assert (torch.tensor([tiny]) * 0.5).item() == tiny / 2


@native
def test_another_order_of_the_sums_shows():
    """Negative control: another order of the sums changes bits that survive the rounding to bfloat16."""
    x, weight = normal(33, 577), normal(1000, 577, seed=1)
    half = torch.cat([x[:, 320:], x[:, :320]], 1), torch.cat([weight[:, 320:], weight[:, :320]], 1)
    assert not torch.equal(small_linear(x, weight), small_linear(*half))


@native
@pytest.mark.parametrize("shape", [(192, 576), (1000, 577), (3, 17)])
def test_instruction_sets_agree(shape):
    x, weight, results = normal(13, shape[1]), normal(*shape, seed=1), []
    lora = (2, 9, normal(5, shape[1], seed=2), normal(5, shape[0], seed=3), 2.0)
    for isa in ISAS:
        _native.core.use(isa)
        results.append(small_linear(x, weight, loras=[lora]))
    _native.core.use(ISAS[0])
    assert all(torch.equal(results[0], other) for other in results)


@native
def test_loras(isa):
    """Spans have gaps, are empty, have one row, or overlap. Ranks are near a vector's width."""
    x, weight, bias = normal(3, 7, 100), normal(70, 100, seed=1), normal(70, seed=2)
    ranges = [(0, 3, 1), (3, 3, 4), (5, 6, 16), (8, 21, 17), (15, 20, 33)]
    loras = [
        (first, last, normal(rank, 100, seed=rank), normal(rank, 70, seed=rank + 50), 0.7 - first / 10)
        for first, last, rank in ranges
    ]
    assert_exact(small_linear(x, weight, bias, loras=loras), x, weight, bias, loras)
    plain, added = small_linear(x, weight), small_linear(x, weight, loras=loras[2:3])
    changed = (plain != added).any(-1).flatten().nonzero().flatten()
    assert changed.tolist() == [5]


@native
def test_special_values(isa):
    weight, x = normal(40, 64), normal(3, 64, seed=1)
    x[1, 7], x[2, 9] = torch.nan, torch.inf
    y = small_linear(x, weight)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert torch.equal(y[2], torch.inf * weight[:, 9].sign())
    big = torch.full((1, 2), 3e38, dtype=torch.bfloat16)
    assert small_linear(big[:, :1], torch.tensor([[1.0]]).bfloat16()) == big[0, 0]  # the largest finite number is kept
    assert small_linear(big, torch.tensor([[1.0, 1.0]]).bfloat16()) == torch.inf


@native
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_fuzz(data):
    out, width, rank = (data.draw(st.integers(low, high)) for low, high in ((1, 100), (1, 200), (1, 20)))
    batch = data.draw(st.lists(st.integers(0, 5), max_size=3))
    seed = data.draw(st.integers(0, 2**20))
    wide = normal(*batch, width + 3, seed=seed)
    layout = data.draw(st.sampled_from(["contiguous", "strided", "transposed", "repeated"]))
    x = wide[..., 1 : width + 1]
    if layout == "contiguous":
        x = x.contiguous()
    elif layout == "transposed" and x.ndim > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "repeated" and x.ndim > 1:
        x = x[:1].expand_as(x)
    weight = normal(out, width + 2, seed=seed + 1)[:, 1 : width + 1]
    bias = normal(out, seed=seed + 2) if data.draw(st.booleans()) else None
    rows, loras = x.shape[:-1].numel(), []
    for i in range(data.draw(st.integers(0, 3))):
        first = data.draw(st.integers(0, rows))
        last = data.draw(st.integers(first, rows))
        a, b = normal(rank, width, seed=seed + 3 + i), normal(rank, out, seed=seed + 9 + i)
        loras.append((first, last, a, b, data.draw(st.sampled_from([0.0, 1.0, -2.5]))))
    assert_exact(small_linear(x, weight, bias, loras=loras), x, weight, bias, loras)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pytorch_serves_other_dtypes(dtype, monkeypatch):
    monkeypatch.setattr(_native, "core", None)
    x, weight, bias = (normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(2, 3, 20), (30, 20), (30,)]))
    lora = (1, 4, normal(4, 20, seed=5, dtype=dtype), normal(4, 30, seed=6, dtype=dtype), 0.5)
    exact, _ = reference(x, weight, bias, [lora])
    rounding = 3 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        small_linear(x, weight, bias, loras=[lora]).double(), exact, rtol=rounding, atol=8 * rounding
    )
    with pytest.raises(ValueError, match=r"span \(0, 7, 0\): expected rows within 0..6"):
        small_linear(x, weight, loras=[(0, 7, *lora[2:])])


@native
def test_changes_in_place_count():
    weight, x = normal(20, 32), normal(2, 32, seed=1)
    linear = SmallLinear(weight)
    weight.mul_(2)
    assert torch.equal(linear(x), small_linear(x, weight))


@native
def test_addresses_stay_with_their_tensors():
    linear, x = SmallLinear(normal(4, 8)), normal(2, 8)
    for misuse in (
        lambda: copy.copy(linear._core),
        lambda: type(linear._core)(),
        lambda: _native.core.linears(()),
        lambda: linear(x, 1),
    ):
        with pytest.raises(TypeError):
            misuse()


def test_autocast_takes_spans_along():
    x, weight, lora = (normal(*shape, dtype=torch.float32) for shape in ((4, 8), (6, 8), (2, 8)))
    linear = SmallLinear(weight, None, [Lora(lora, normal(2, 6, dtype=torch.float32), 0.5)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear(x, [(1, 3, 0)])
    torch.testing.assert_close(found.float(), linear(x, [(1, 3, 0)]), rtol=0.02, atol=0.1)


@native
def test_tensors_without_memory_are_left_to_pytorch():
    x, weight = normal(2, 8), normal(4, 8)
    linear, expected = SmallLinear(weight), small_linear(x, weight)
    torch.testing.assert_close(torch.vmap(linear)(x[None])[0], expected)
    torch.testing.assert_close(torch.func.functionalize(linear)(x), expected)
    assert not SmallLinear(torch._efficientzerotensor(4, 8, dtype=torch.bfloat16))(x).any()
    with FakeTensorMode() as mode:
        assert small_linear(mode.from_tensor(x), mode.from_tensor(weight)).shape == (2, 4)
