"""small_linear is within its rounding of float64. A row's bits do not depend on other rows, threads or ISA.

In float32 the bits are those of the reference.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linears import normal
from torch._subclasses.fake_tensor import FakeTensorMode

from genarm_fast.kernels import Lora, SmallLinear, _native, small_linear, small_linear_reference

ISAS = [isa for isa in _native.core.instruction_sets() if isa != "baseline"] if _native.core else []
native = pytest.mark.skipif(not ISAS, reason="no C++ core, or no AVX2")
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


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
    """Allow one rounding to the dtype, and the error of float32 sums of in / 16 terms for each lane and a few more."""
    exact, magnitude = reference(x, weight, bias, loras)
    ranks = sum(len(a) for _, _, a, _, _ in loras)
    bound = exact.abs() * torch.finfo(x.dtype).eps + magnitude * 2.0**-24 * (x.shape[-1] / 16 + 2 * ranks + 12)
    assert y.shape == exact.shape
    assert y.dtype == x.dtype
    assert ((y.double() - exact).abs() <= bound).all()


@native
@dtypes
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 17), (1000, 577), (16, 32), (192, 576), (17, 1536), (1000, 31), (5, 0), (0, 5)]
)
def test_shapes(isa, shape, dtype):
    weight, bias = normal(*shape, seed=1, dtype=dtype), normal(shape[0], seed=2, dtype=dtype)
    for rows in [*range(10), 16, 33]:
        x = normal(rows, shape[1], seed=3, dtype=dtype)
        assert_exact(small_linear(x, weight), x, weight)
        assert_exact(small_linear(x, weight, bias), x, weight, bias)


@native
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (33, 577), (20, 1100), (16, 32), (9, 31), (5, 0)])
def test_float32_has_the_bits_of_the_reference(isa, threads, shape):
    """Few rows, and rows so many that the weights are copied first, with and without bias and LoRAs."""
    out, width = shape
    x, weight, bias, a, b = (
        normal(*each, seed=i, dtype=torch.float32)
        for i, each in enumerate([(130, width), shape, (out,), (18, width), (18, out)])
    )
    alone = small_linear_reference(x, weight)
    adapted = {}
    for rows in (3, 33, 130):
        loras = [(0, rows, a, b, 0.7), (rows // 3, rows // 2 + 1, a[:3], b[:3], -1.5)]
        adapted[rows] = loras, small_linear_reference(x[:rows], weight, bias, loras=loras)
        assert not width or not torch.equal(adapted[rows][1], alone[:rows] + bias)
    for n in (1, 2):
        threads(n)
        for rows in (1, 2, 3, 5, 8, 9, 16, 31, 33, 65, 130):
            assert torch.equal(small_linear(x[:rows], weight), alone[:rows])
        for rows, (loras, expected) in adapted.items():
            assert torch.equal(small_linear(x[:rows], weight, bias, loras=loras), expected)


def test_the_reference_of_float32_alone():
    with pytest.raises(ValueError, match=r"weight of shape \(4, 8\), torch.bfloat16: expected \[out, in\], float32"):
        small_linear_reference(normal(2, 8), normal(4, 8))


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
@pytest.mark.parametrize("rows", [1, 3, 8, 40, 70])
def test_float32_keeps_the_smallest_numbers(isa, rows):
    """Subnormal numbers count, also where the caller's thread counts them as zeros."""
    x, weight = (normal(*shape, seed=rows, dtype=torch.float32) * 2.0**-70 for shape in ((rows, 100), (30, 100)))
    expected = small_linear_reference(x, weight)
    assert ((expected != 0) & (expected.abs() < 2.0**-126)).any()
    assert torch.equal(small_linear(x, weight), expected)
    assert torch.set_flush_denormal(True)
    try:
        found = small_linear(x, weight)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, expected)


@native
@dtypes
def test_another_order_of_the_sums_shows(dtype):
    """Negative control: another order of the inputs gives other bits, so rounding does not hide the order."""
    x, weight = normal(33, 577, dtype=dtype), normal(1000, 577, seed=1, dtype=dtype)
    half = torch.cat([x[:, 320:], x[:, :320]], 1), torch.cat([weight[:, 320:], weight[:, :320]], 1)
    assert not torch.equal(small_linear(x, weight), small_linear(*half))


@native
@dtypes
@pytest.mark.parametrize("rows", [13, 80])
@pytest.mark.parametrize("shape", [(192, 576), (1000, 577), (3, 17)])
def test_instruction_sets_agree(shape, rows, dtype):
    x, weight, results = normal(rows, shape[1], dtype=dtype), normal(*shape, seed=1, dtype=dtype), []
    lora = (2, 9, normal(5, shape[1], seed=2, dtype=dtype), normal(5, shape[0], seed=3, dtype=dtype), 2.0)
    for isa in ISAS:
        _native.core.use(isa)
        results.append(small_linear(x, weight, loras=[lora]))
    _native.core.use(ISAS[0])
    assert all(torch.equal(results[0], other) for other in results)


@native
@dtypes
def test_loras(isa, dtype):
    """Spans have gaps, are empty, have one row, or overlap. Ranks are near a vector's width."""
    x, weight = normal(3, 7, 100, dtype=dtype), normal(70, 100, seed=1, dtype=dtype)
    bias = normal(70, seed=2, dtype=dtype)
    ranges = [(0, 3, 1), (3, 3, 4), (5, 6, 16), (8, 21, 17), (15, 20, 33)]
    loras = [
        (
            first,
            last,
            normal(rank, 100, seed=rank, dtype=dtype),
            normal(rank, 70, seed=rank + 50, dtype=dtype),
            0.7 - first / 10,
        )
        for first, last, rank in ranges
    ]
    assert_exact(small_linear(x, weight, bias, loras=loras), x, weight, bias, loras)
    plain, added = small_linear(x, weight), small_linear(x, weight, loras=loras[2:3])
    changed = (plain != added).any(-1).flatten().nonzero().flatten()
    assert changed.tolist() == [5]


@native
@dtypes
def test_special_values(isa, dtype):
    weight, x = normal(40, 64, dtype=dtype), normal(3, 64, seed=1, dtype=dtype)
    x[1, 7], x[2, 9] = torch.nan, torch.inf
    y = small_linear(x, weight)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert torch.equal(y[2], torch.inf * weight[:, 9].sign())
    big = torch.full((1, 2), 3e38, dtype=dtype)
    assert small_linear(big[:, :1], torch.ones(1, 1, dtype=dtype)) == big[0, 0]  # no overflow of finite numbers
    assert small_linear(big, torch.ones(1, 2, dtype=dtype)) == torch.inf


@native
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_fuzz(data):
    out, width, rank = (data.draw(st.integers(low, high)) for low, high in ((1, 100), (1, 200), (1, 20)))
    batch = data.draw(st.lists(st.integers(0, 5), max_size=3))
    seed, dtype = data.draw(st.integers(0, 2**20)), data.draw(st.sampled_from([torch.bfloat16, torch.float32]))
    wide = normal(*batch, width + 3, seed=seed, dtype=dtype)
    layout = data.draw(st.sampled_from(["contiguous", "strided", "transposed", "repeated"]))
    x = wide[..., 1 : width + 1]
    if layout == "contiguous":
        x = x.contiguous()
    elif layout == "transposed" and x.ndim > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "repeated" and x.ndim > 1:
        x = x[:1].expand_as(x)
    weight = normal(out, width + 2, seed=seed + 1, dtype=dtype)[:, 1 : width + 1]
    bias = normal(out, seed=seed + 2, dtype=dtype) if data.draw(st.booleans()) else None
    rows, loras = x.shape[:-1].numel(), []
    for i in range(data.draw(st.integers(0, 3))):
        first = data.draw(st.integers(0, rows))
        last = data.draw(st.integers(first, rows))
        a, b = (normal(rank, n, seed=seed + 3 + i, dtype=dtype) for n in (width, out))
        loras.append((first, last, a, b, data.draw(st.sampled_from([0.0, 1.0, -2.5]))))
    found = small_linear(x, weight, bias, loras=loras)
    assert_exact(found, x, weight, bias, loras)
    assert dtype != torch.float32 or torch.equal(found, small_linear_reference(x, weight, bias, loras=loras))


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
