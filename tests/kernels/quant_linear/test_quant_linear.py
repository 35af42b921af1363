"""quant_linear gives the reference's bits on every ISA, for any rows and threads. The reference is near float64."""

from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linears import inputs, normal, random_weight

from genarm_fast.kernels import (
    Lora,
    QuantLinear,
    QuantWeight,
    _native,
    quant_linear,
    quant_linear_reference,
)
from genarm_fast.kernels.quant_linear import dequantize, exact, quantize, rows_in_pytorch
from genarm_fast.kernels.quant_linear.reference import fma, quantize_inputs
from genarm_fast.kernels.quant_linear.rounding import exact_in_pytorch

ISAS = _native.core.instruction_sets() if _native.core else []
native = pytest.mark.skipif(not ISAS, reason="no C++ core")
with_loras = pytest.mark.skipif(ISAS in ([], ["baseline"]), reason="no C++ core, or no AVX2")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(192, 576), (70, 100), (3, 17)])
def test_reference_is_the_product(bits, shape):
    weight, bias, x = random_weight(*shape, bits), normal(shape[0], seed=5), inputs(9, shape[1])
    values = dequantize(weight).double()
    wanted = x.double() @ values.T + bias.double()
    magnitude = x.double().abs() @ values.abs().T + bias.double().abs()
    if bits == 4:  # codes and minimum partly cancel, after each has been rounded
        magnitude += x.double().abs() @ torch.full_like(values, float(values.abs().max()) * 2).T
    error = (quant_linear_reference(x, weight, bias).double() - wanted).abs()
    bound = wanted.abs() * 2.0**-8 + magnitude * (2.0**-14 + 2.0**-22)
    assert (error <= bound).all()
    worse = QuantWeight(weight.codes.clone(), *weight[1:])
    worse.codes[0, 0] ^= 8  # negative control: one wrong code
    assert not ((quant_linear_reference(x, worse, bias).double() - wanted).abs() <= bound).all()


@native
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 17), (1000, 577), (16, 32), (192, 576), (17, 1536), (100, 31), (5, 0), (0, 5)]
)
def test_shapes(isa, bits, shape):
    weight, bias = random_weight(*shape, bits), normal(shape[0], seed=2)
    plain, biased = QuantLinear(weight), QuantLinear(weight, bias)
    assert plain._core is not None
    for rows in [*range(10), 16, 33]:
        x = inputs(rows, shape[1], seed=3)
        assert torch.equal(plain(x), quant_linear_reference(x, weight))
        assert torch.equal(biased(x), quant_linear_reference(x, weight, bias))


@native
@pytest.mark.parametrize("bits", [8, 4])
def test_largest_sums(isa, bits):
    """With the largest codes and inputs, no sum of whole numbers overflows."""
    least, most = (-128, 127) if bits == 8 else (0, 15)
    for code in (least, most):
        codes = torch.full((33, 96), code, dtype=torch.int8 if bits == 8 else torch.uint8)
        scales = torch.full((33, 3), 0.5).half()
        weight = QuantWeight(codes, scales, None if bits == 8 else scales)
        for sign in (1, -1):
            x = torch.full((5, 96), sign * 1.9921875, dtype=torch.bfloat16)
            wanted = (x.double() @ dequantize(weight).double().T).bfloat16()
            assert torch.equal(quant_linear(x, weight), wanted)


@native
@pytest.mark.parametrize("bits", [8, 4])
def test_special_values(isa, bits):
    weight, x = random_weight(40, 64, bits), inputs(8, 64, seed=1)
    x[1, 7], x[2, 40], x[3, 0] = torch.nan, torch.inf, -torch.inf
    x[4, 3] = 2.0**97
    x[5], x[6] = 0, 2.0**-70
    x[7, :32] = 2.0**96
    y = quant_linear(x, weight)
    assert torch.equal(y, quant_linear_reference(x, weight)) or torch.equal(
        y.nan_to_num(7.0), quant_linear_reference(x, weight).nan_to_num(7.0)
    )
    assert y[1:5].isnan().all()
    assert y[[0, 5, 6, 7]].isfinite().all()
    assert not y[5].any()


@pytest.mark.parametrize("bits", [8, 4])
def test_outliers_cost_their_own_group_only(bits):
    """An input of 10,000 beside others of about 1, like a massive activation, makes only its own group less exact."""
    weight, x = random_weight(64, 576, bits), normal(4, 576, seed=1)
    x[:, 100] = 10000
    wanted = x.double() @ dequantize(weight).double().T
    others = x.double().abs() @ dequantize(weight).double().abs().T
    error = (quant_linear(x, weight).double() - wanted).abs()
    assert (error <= wanted.abs() * 2.0**-8 + 32 * 0.32 * 2.0**-1 * 1.5 + others * 2.0**-22).all()
    whole, _ = quantize_inputs(normal(1, 576, seed=1))
    assert whole.abs().max() >= 2**14


@given(
    numbers=st.tuples(st.integers(-(2**24), 2**24), st.integers(-2047, 2047), st.floats(-(2.0**60), 2.0**60, width=32)),
    power=st.integers(-60, 20),
)
@settings(max_examples=300, deadline=None)
def test_fma_is_rounded_once(numbers, power):
    a, b, c = numbers[0], numbers[1] * 2.0**power, numbers[2]
    found = fma(torch.tensor(float(a)), torch.tensor(b), torch.tensor(c)).item()
    wanted = Fraction(a) * Fraction(b) + Fraction(c)
    below, above = (torch.nextafter(torch.tensor(found), torch.tensor(to)).item() for to in (-torch.inf, torch.inf))
    if wanted and abs(wanted) >= Fraction(2.0**-126):
        assert abs(Fraction(found) - wanted) <= min(abs(Fraction(other) - wanted) for other in (below, above))


def test_fma_where_double_rounding_shows():
    """For 1 + 2^-24 + 2^-60, float64 holds 1 + 2^-24, a tie that float32 would then round down to 1."""
    a, b = torch.tensor(2.0**-24), torch.tensor(1.0, dtype=torch.float64) + 2.0**-36
    assert fma(a, b, torch.tensor(1.0)) == 1 + 2.0**-23
    assert fma(a, 2 - b, torch.tensor(1.0)) == 1  # just below the tie


@with_loras
@pytest.mark.parametrize("bits", [8, 4])
def test_loras(bits):
    """Spans have gaps, are empty, have one row, or overlap. Ranks are near a vector's width. Rows do not mix."""
    weight, x, bias = random_weight(70, 100, bits), normal(3, 7, 100), normal(70, seed=1)
    spans = [(0, 3, 0), (3, 3, 1), (5, 6, 2), (8, 21, 3), (15, 20, 4)]
    loras = [
        Lora(normal(rank, 100, seed=rank), normal(rank, 70, seed=rank + 50), 0.7 - rank / 50)
        for rank in (1, 4, 16, 17, 33)
    ]
    linear = QuantLinear(weight, bias, loras)
    assert linear._core is not None
    found = linear(x, spans)
    by_call = [(first, last, *loras[i]) for first, last, i in spans]
    wanted = quant_linear_reference(x, weight, bias, loras=by_call)
    torch.testing.assert_close(found.float(), wanted.float(), rtol=2**-7, atol=2e-2)
    untouched = [3, 4, 6, 7]
    assert torch.equal(found.view(21, 70)[untouched], wanted.view(21, 70)[untouched])
    flat = x.view(21, 100)
    for row in range(21):
        own = [(0, 1, i) for first, last, i in spans if first <= row < last]
        assert torch.equal(linear(flat[row : row + 1], own), found.view(21, 70)[row : row + 1])
    assert not torch.equal(linear(x, spans[:-1]), found)  # negative control: one span less


@native
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_fuzz(data):
    out, width, bits = (
        data.draw(st.integers(1, 100)),
        data.draw(st.integers(1, 200)),
        data.draw(st.sampled_from([8, 4])),
    )
    batch = data.draw(st.lists(st.integers(0, 5), max_size=3))
    seed = data.draw(st.integers(0, 2**20))
    wide = inputs(*batch, width + 3, seed=seed) * 2.0 ** data.draw(st.integers(-80, 80))
    layout = data.draw(st.sampled_from(["contiguous", "strided", "transposed", "repeated"]))
    x = wide[..., 1 : width + 1]
    if layout == "contiguous":
        x = x.contiguous()
    elif layout == "transposed" and x.ndim > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "repeated" and x.ndim > 1:
        x = x[:1].expand_as(x)
    weight = random_weight(out, width, bits, seed)
    bias = normal(out, seed=seed) if data.draw(st.booleans()) else None
    assert torch.equal(quant_linear(x, weight, bias), quant_linear_reference(x, weight, bias))


@pytest.mark.parametrize("bits", [8, 4])
def test_without_a_core(bits, monkeypatch):
    weight, x = random_weight(40, 70, bits), inputs(2, 3, 70)
    monkeypatch.setattr(_native, "core", None)
    linear = QuantLinear(weight)
    assert linear._core is None
    assert torch.equal(linear(x), quant_linear_reference(x, weight))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [70, 64, 1])
def test_rows_of_the_weight(isa, threads, bits, width):
    """Scales have both signs and may be subnormal in float16. Indices come in any order and with strides."""
    made = random_weight(100, width, bits)
    made = made._replace(scales=(made.scales * 10.0 ** -torch.arange(100)[:, None].remainder(7)).half())
    linear = QuantLinear(made)
    indices = torch.tensor([[0, 99, 31], [32, 5, 5]])
    for n in (1, 2):
        threads(n)
        many = torch.randint(0, 100, (65_600 // width,))  # so many that threads share them
        for some in (indices, indices.T, indices[:, 1], indices[0, 0], many):
            expected = dequantize(linear.weight).bfloat16()[some]
            assert torch.equal(linear.rows(some), expected)
            assert torch.equal(rows_in_pytorch(linear, some), expected)
        assert torch.equal(linear.rows(indices[:0]), torch.empty(0, 3, width, dtype=torch.bfloat16))


@native
def test_rows_that_a_weight_does_not_have_are_refused():
    linear = QuantLinear(random_weight(40, 70, 8))
    for wrong in (-1, 40, 1 << 40):
        for rows in (linear.rows, partial(rows_in_pytorch, linear)):
            with pytest.raises(IndexError, match=f"{wrong}.*expected.*40 rows"):
                rows(torch.tensor([3, wrong]))
    packed, one = linear.packed, torch.tensor([1])
    assert _native.core.quant_rows(packed, one.int(), 40, 70, 8) is None  # left to PyTorch
    assert _native.core.quant_rows(packed, one, 40, 70, 5) is None
    assert _native.core.quant_rows(packed, one, 100, 70, 8) is None  # the memory has another size
    assert _native.core.quant_rows(packed, one, 1 << 62, 1 << 62, 8) is None
    with pytest.raises(TypeError):
        _native.core.quant_rows(packed, one)


@pytest.mark.parametrize(("bits", "step"), [(8, 254), (4, 30)])
def test_quantize_is_to_the_nearest(bits, step):
    weight = normal(50, 100, seed=3)
    error = (dequantize(quantize(weight, bits)) - weight.float()).abs()
    groups = torch.nn.functional.pad(weight.float(), (0, 28), value=float("nan")).unflatten(-1, (-1, 32))
    spread = groups.nan_to_num(0).abs().amax(-1) * (1 if bits == 8 else 2)
    assert (error <= spread.repeat_interleave(32, 1)[:, :100] * (1.02 / step) + 1e-3).all()
    zeros = quantize(torch.zeros(3, 40), bits)
    assert not dequantize(zeros).any()


@pytest.mark.parametrize("bits", [8, 4])
def test_exact_finds_codes_again(bits):
    made = random_weight(60, 100, bits, seed=4)
    scales = (made.scales.abs() + 0.01).half()  # steps that bfloat16 holds
    made = QuantWeight(made.codes, scales, None if bits == 8 else -7 * scales)
    made.codes[:, ::32] = 127 if bits == 8 else 0  # rounding gives each group a value at an end of its range
    if bits == 8:
        made = made._replace(codes=made.codes.clamp(-127, 127))
    else:  # GGUF's Q4_0 has scales of both signs
        signs = torch.where(torch.arange(60) % 2 == 0, 1, -1)[:, None]
        made = made._replace(scales=scales * signs, minimums=-8 * scales * signs)
    weight = dequantize(made).bfloat16()
    found = exact(weight, bits)
    assert found is not None
    assert torch.equal(dequantize(found).bfloat16(), weight)
    weight[13, 57] *= 1.02  # negative control: one value off the grid
    off = exact(weight, bits)
    assert off is None or torch.equal(dequantize(off).bfloat16(), weight)
    assert exact(normal(60, 100), bits) is None
    assert exact(weight.float(), bits) is None


TIES = {  # (scale, minimum) → codes: another minimum is equally near to the middle of the range, but not exact
    (0.004295, -0.01498): "2 9 15 1 5 6 2 2 6 9 2 0 1 4 6 0 0 3 0 0 5 4 1 5 1 4 2 7 1 8 11 3",
    (0.005035, -0.02922): "10 1 11 10 9 1 12 4 2 11 7 2 8 12 10 12 0 1 5 2 12 11 3 10 0 14 15 7 11 7 0 1",
    (0.004333, -0.03032): "10 8 12 14 11 3 6 13 3 0 0 11 13 15 6 2 5 11 12 8 2 8 1 4 12 4 6 3 0 6 11 6",
}


@pytest.mark.parametrize("search", ["core", "pytorch"])
def test_exact_finds_minimums_at_a_tie(search):
    """A search that tries only the nearest minimum fails on these groups of Q4_1, as on one in 20,000 random groups."""
    if search == "core" and not ISAS:
        pytest.skip("no C++ core")
    for (scale, minimum), codes in TIES.items():
        codes = torch.tensor([[int(code) for code in codes.split()]], dtype=torch.uint8)
        made = QuantWeight(codes, torch.tensor([[scale]]).half(), torch.tensor([[minimum]]).half())
        weight = dequantize(made).bfloat16()
        found = exact_in_pytorch(weight, 4) if search == "pytorch" else _native.core.exact_codes(weight, 4)
        assert found
        assert torch.equal(dequantize(QuantWeight(*found)).bfloat16(), weight)


@native
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("low", "high", "width"), [(0, 15, 96), (2, 11, 100), (7, 7, 33)])
def test_the_search_in_the_core_finds_what_pytorch_finds(isa, threads, bits, low, high, width):
    """Grids have up to sixteen codes, scales of both signs down to float16's subnormals, and short groups."""
    made = random_weight(40, width, bits, seed=5)
    codes = (made.codes.int() % (high - low + 1) + low).to(made.codes.dtype)
    sizes = 10.0 ** -torch.arange(40)[:, None].remainder(8)
    weight = dequantize(made._replace(codes=codes, scales=(made.scales * sizes).half())).bfloat16()
    expected = exact_in_pytorch(weight, bits)
    for n in (1, 2):
        threads(n)
        found = _native.core.exact_codes(weight, bits)
        if expected is None:
            assert found is False
            continue
        assert all(torch.equal(*pair) for pair in zip(found, expected) if pair[0] is not None)


@native
def test_the_search_in_the_core_gives_the_weights_back_or_nothing(isa):
    for bits in (8, 4):
        weight = dequantize(random_weight(64, 64, bits, seed=6)).bfloat16()
        found = [exact(row[None], bits) for row in weight]
        given = [row for row, codes in zip(weight, found) if codes is not None]
        assert given
        assert all(torch.equal(dequantize(codes).bfloat16()[0], row) for codes, row in zip(filter(None, found), given))
        huge = torch.full((1, 32), 3e38, dtype=torch.bfloat16)
        huge[0, ::2] *= -1
        assert exact(huge, bits) is None
    assert _native.core.exact_codes(weight.float(), 4) is None  # PyTorch refuses it
    assert _native.core.exact_codes(weight, 5) is None
    with pytest.raises(TypeError):
        _native.core.exact_codes(weight)


def test_errors():
    weight, four = random_weight(4, 40, 8), random_weight(4, 40, 4)
    with pytest.raises(TypeError, match="expected a QuantWeight"):
        QuantLinear(normal(4, 40))
    for wrong, message in (
        (weight._replace(codes=weight.codes.short()), r"weight.codes: \(4, 40\), torch.int16: expected torch.int8"),
        (weight._replace(codes=weight.codes[0]), r"weight.codes: \(40,\)"),
        (weight._replace(scales=weight.scales[:, :1]), r"weight.scales: \(4, 1\).*expected float16 \(4, 2\)"),
        (weight._replace(scales=weight.scales.float()), "weight.scales: .*torch.float32"),
        (weight._replace(scales=weight.scales * torch.nan), "weight.scales: 8 are NaN or infinite"),
        (weight._replace(scales=weight.scales * 1e30), "weight.scales: 8 are NaN or infinite"),
        (four._replace(minimums=four.minimums * torch.inf), "weight.minimums: 8 are NaN or infinite"),
        (four._replace(minimums=four.minimums[:2]), r"weight.minimums: \(2, 2\)"),
        (four._replace(codes=four.codes + 1), "weight.codes from 1 to 16: expected 0 to 15"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantLinear(wrong)
    with pytest.raises(ValueError, match="bits=5"):
        quantize(normal(2, 2), 5)
    with pytest.raises(ValueError, match="1 values are NaN"):
        quantize(torch.tensor([[1.0, torch.nan]]), 8)
    with pytest.raises(ValueError, match="scales float16 holds"):
        quantize(torch.full((1, 32), 1e30), 8)


@native
def test_compiled_and_traced():
    linear, x = QuantLinear(random_weight(40, 70, 8)), inputs(2, 70)
    compiled = torch.compile(lambda x: linear(x) * 2, backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(x), linear(x) * 2)
