"""Properties that small_linear and quant_linear share: a row's bits among others, siblings, LoRA, copies and errors."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from linears import KINDS, dtype_of, inputs, made, normal, random_weight, ranks

from genarm_fast.kernels import (
    SiblingLinears,
    SmallLinear,
    _native,
    quant_linear,
    quant_linear_reference,
    small_linear,
    small_linear_reference,
)

ISAS = _native.core.instruction_sets() if _native.core else []
native = pytest.mark.skipif(ISAS in ([], ["baseline"]), reason="no C++ core, or no AVX2")
kinds = pytest.mark.parametrize("bits", KINDS)


@native
@kinds
@pytest.mark.parametrize(("out", "width"), [(192, 576), (3000, 577), (300, 4096)])
def test_rows_do_not_depend_on_their_company(isa, threads, bits, out, width):
    dtype = dtype_of(bits)
    loras = ranks(out, width, 8, dtype=dtype)
    if isa == "baseline":  # The baseline has no loops for float32 and bfloat16 weights, and LoRA needs such loops.
        if bits >= 16 or out == 3000:
            pytest.skip("not there, or slow")
        loras = []
    linear = made(bits, out, width, normal(out, seed=2, dtype=dtype), loras)
    x = inputs(400, width, dtype=dtype)
    assert linear._core is not None

    def run(x):
        return linear(x, ((0, len(x), 0),) if loras else ())

    threads(1)
    alone = torch.cat([run(row[None]) for row in x])
    for n in (1, 2, 3):
        threads(n)
        for rows in [*range(1, 34), 69, 400]:  # For 4096 inputs, 69 = 64 + 5 gives a last table of few rows.
            assert torch.equal(run(x[:rows]), alone[:rows])
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)  # one element off any alignment
    assert torch.equal(run(shifted[5:40]), alone[5:40])


@native
@kinds
def test_a_span_changes_its_own_rows(bits):
    """Spans of two LoRAs change their rows by what float64 gives, in any table of rows, and no other rows."""
    width, out, rows = 100, 70, 300
    dtype, rounding = dtype_of(bits), 2.0 ** (-20 if bits == 32 else -7)
    loras = ranks(out, width, 3, 300, dtype=dtype)
    linear, x = made(bits, out, width, None, loras), normal(rows, width, dtype=dtype)
    plain = linear(x)
    for first, last, index in ((0, 0, 0), (0, 1, 1), (7, 9, 0), (40, 290, 1), (0, rows, 0)):
        found = linear(x, [(first, last, index)])
        inside = torch.zeros(rows, dtype=torch.bool)
        inside[first:last] = True
        assert torch.equal(found[~inside], plain[~inside])
        a, b, scale = loras[index]
        added = scale * (x[inside].double() @ a.double().T @ b.double())
        error = (found[inside].double() - plain[inside].double() - added).abs()
        assert (error <= rounding * (found[inside].double().abs() + plain[inside].double().abs()) + 1e-3).all()


@pytest.mark.parametrize("core", [True, False])
@pytest.mark.parametrize("width", [100, 700])
@pytest.mark.parametrize("held", [(32, 32, 32, 32), (16, 16, 16, 16), (8, 4, 16, 8), (4, 8, 8, 4)])
def test_siblings_are_the_linears_one_by_one(threads, monkeypatch, core, width, held):
    if not core:
        monkeypatch.setattr(_native, "core", None)
    dtype = dtype_of(held[0])
    loras = ranks(1000, width, 4, 17, dtype=dtype)
    linears = [
        made(held[0], 300, width, normal(300, seed=2, dtype=dtype), seed=1),
        made(held[1], 1000, width, None, loras, seed=3),
        made(held[2], 5, width, seed=4),
        made(held[3], 1000, width, normal(1000, seed=6, dtype=dtype), loras[1:], seed=5),
    ]
    siblings = SiblingLinears(linears)
    for n in (1, 2):
        threads(n)
        for rows in (1, 3, 9, 40):
            spans = [(), ((0, rows, 1), (1, 2, 0)), (), ((rows, 2 * rows, 0),)]
            strided = normal(2, rows, width, seed=7, dtype=dtype).transpose(0, 1)
            for x in (strided, strided.contiguous()):
                alone = [linear(x, own) for linear, own in zip(linears, spans)]
                assert all(map(torch.equal, siblings(x, spans), alone))
                assert torch.equal(siblings.stacked(x, spans), torch.cat(alone, -1))
            spans[3] = ()  # negative control: without its span, the last linear differs
            assert [torch.equal(*pair) for pair in zip(siblings(x, spans), alone)] == [True, True, True, False]


@native
def test_siblings_of_a_generator_are_one_call():
    assert SiblingLinears(made(bits, 4, 8) for bits in KINDS if bits < 32)._core is not None
    assert SiblingLinears(made(32, 4, 8) for _ in range(2))._core is not None


def test_siblings_of_two_dtypes_take_no_input():
    for held in ((32, 16), (16, 32), (8, 32)):
        siblings = SiblingLinears([made(bits, 4, 8) for bits in held])
        assert siblings._core is None
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(ValueError, match=r"x of shape \(2, 8\), torch.*as the weight"):
                siblings(normal(2, 8, dtype=dtype), [(), ()])


def test_siblings_refuse():
    with pytest.raises(ValueError, match=r"linears=\[\]"):
        SiblingLinears([])
    for bits in KINDS:
        linear, wide, dtype = made(bits, 4, 8), made(bits, 4, 9), dtype_of(bits)
        with pytest.raises(ValueError, match="spans for 1 linears: expected 2"):
            SiblingLinears([linear, linear])(normal(2, 8, dtype=dtype), [()])
        with pytest.raises(ValueError, match="spans for 1 linears: expected 2"):
            SiblingLinears([linear, linear]).stacked(normal(2, 8, dtype=dtype), [()])
        with pytest.raises(ValueError, match=r"x of shape \(2, 8\)"):
            SiblingLinears([linear, wide])(normal(2, 8, dtype=dtype), [(), ()])
        with pytest.raises(ValueError, match=r"span \(0, 3, 0\)"):
            SiblingLinears([linear, linear])(normal(2, 8, dtype=dtype), [(), ((0, 3, 0),)])
        with pytest.raises(ValueError, match="no gradient"):
            SiblingLinears([linear])(normal(2, 8, dtype=dtype).requires_grad_(), [()])


@kinds
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda linear: pickle.loads(pickle.dumps(linear))])
def test_copies(bits, copied):
    dtype = dtype_of(bits)
    x, spans = normal(2, 40, dtype=dtype), [(0, 1, 0)]
    linear = made(bits, 20, 40, normal(20, dtype=dtype), ranks(20, 40, 2, dtype=dtype))
    expected, (twin,) = linear(x, spans), copied(SiblingLinears([linear])).linears
    if copied is not copy.copy:
        (linear.weight if bits >= 16 else linear.packed).zero_()
        linear.loras[0].a.zero_()
        assert not torch.equal(linear(x, spans), expected)
    assert torch.equal(twin(x, spans), expected)


@kinds
@pytest.mark.parametrize("core", [True, False])
def test_errors(monkeypatch, bits, core):
    if not core:
        monkeypatch.setattr(_native, "core", None)
    dtype, other = dtype_of(bits), torch.bfloat16 if bits == 32 else torch.float32

    def call(x, bias=None, loras=()):
        own = [lora[2:] for lora in loras]
        return made(bits, 4, 8, bias, own)(x, [(first, last, i) for i, (first, last, *_) in enumerate(loras)])

    def at_once(x, bias=None, loras=()):
        if bits >= 16:
            return small_linear(x, normal(4, 8, seed=1, dtype=dtype), bias, loras=loras)
        return quant_linear(x, random_weight(4, 8, bits, 1), bias, loras=loras)

    def reference(x, bias=None, loras=()):
        if bits == 32:
            return small_linear_reference(x, normal(4, 8, seed=1, dtype=dtype), bias, loras=loras)
        return quant_linear_reference(x, random_weight(4, 8, bits, 1), bias, loras=loras)

    x, a, b = (normal(*shape, dtype=dtype) for shape in ((2, 8), (2, 8), (2, 4)))
    good = (x, normal(4, dtype=dtype), [(0, 1, a, b, 1.0)])
    assert torch.equal(call(*good), at_once(*good))
    for run in (call, at_once, *([reference] if bits != 16 else [])):
        with pytest.raises(ValueError, match=r"x of shape \(2, 7\)"):
            run(x[:, :7])
        with pytest.raises(ValueError, match=rf"x of shape .* {other}"):
            run(x.to(other))
        with pytest.raises(ValueError, match=r"bias of shape \(8,\).*expected \(4,\)"):
            run(x, x[0])
        with pytest.raises(ValueError, match=rf"bias of shape \(4,\), {other}"):
            run(x, b[0].to(other))
        with pytest.raises(ValueError, match=r"loras\[0\].b of shape \(3, 4\).*expected \(2, 4\)"):
            run(x, loras=[(0, 1, a, normal(3, 4, dtype=dtype), 1.0)])
        for first, last in ((-1, 1), (0, 3), (2, 1)):
            with pytest.raises(ValueError, match=rf"span \({first}, {last}, 0\)"):
                run(x, loras=[(first, last, a, b, 1.0)])
    with torch.no_grad():
        call(x.clone().requires_grad_())
    with pytest.raises(ValueError, match="no gradient"):
        at_once(x.clone().requires_grad_())


@kinds
@pytest.mark.parametrize("core", [True, False])
def test_spans_that_are_none(monkeypatch, bits, core):
    if not core:
        monkeypatch.setattr(_native, "core", None)
    dtype = dtype_of(bits)
    linear = made(bits, 4, 8, None, ranks(4, 8, 2, dtype=dtype))
    for spans in ([[0, 1, 0]], [0], range(10**18), [(0, 1)], [(0, 1, 0, 0)], [(0, 0.5, 0)], [(0, None, 0)]):
        with pytest.raises(TypeError, match=r"span .*: expected \(first row, last row, LoRA\), three ints"):
            linear(normal(2, 8, dtype=dtype), spans)


@kinds
def test_compiled(bits):
    torch._dynamo.reset()
    dtype = dtype_of(bits)
    linear = made(bits, 40, 70, normal(40, dtype=dtype), ranks(40, 70, 2, dtype=dtype))
    x = normal(4, 70, dtype=dtype)

    def half(x):
        return linear(x, [(0, len(x) // 2, 0)]) * 2

    compiled = torch.compile(half, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.inference_mode():
        for rows in (2, 3, 4):
            assert torch.equal(compiled(x[:rows]), half(x[:rows]))


@native
def test_a_forked_process_has_its_own_threads():
    code = """
import os, torch
from genarm_fast.kernels import QuantLinear, SmallLinear
from genarm_fast.kernels.quant_linear import quantize
torch.set_num_threads(2)
weight, x = torch.ones(2048, 1024).bfloat16(), torch.ones(1, 1024).bfloat16()
linears = [SmallLinear(weight), QuantLinear(quantize(weight, 4)), SmallLinear(weight.float())]
for linear in linears:
    linear(x.to(linear.dtype))
pid = os.fork()
for _ in range(50):
    assert all((linear(x.to(linear.dtype)) == 1024).all() for linear in linears)
if pid:
    assert os.waitpid(pid, 0)[1] == 0
    print("all")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=60)
    assert done.stdout.strip() == "all", done.stderr


def test_weights_that_are_none():
    with pytest.raises(ValueError, match=r"weight of shape \(8,\)"):
        small_linear(normal(2, 8), normal(8))
    with pytest.raises(ValueError, match=r"weight of shape .* torch.int64"):
        SmallLinear(torch.ones(4, 8, dtype=torch.int64))
