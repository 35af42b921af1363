"""Every op takes or refuses unusual tensors.

They have the negative bit, zero rows, odd addresses, or numbers at the ends of int64.
"""

from pathlib import Path

import pytest
import torch
from every_op import OPS, called, misaligned, negated, tensors_of, without_rows

from genarm_fast import kernels
from genarm_fast.kernels import (
    _native,
    guided_sample,
    guided_sample_reference,
    ragged_append,
    settle,
    settle_reference,
)
from genarm_fast.kernels.quant_linear import QuantLinear, dequantize, quantize
from genarm_fast.kernels.quant_linear.rounding import exact_in_pytorch

ENDS = torch.iinfo(torch.int64)


@pytest.fixture(params=["core", "without"], autouse=True)
def core(request, monkeypatch):
    if request.param == "without":
        monkeypatch.setattr(_native, "core", None)
    elif _native.core is None:
        pytest.skip("built without a compiler")


def test_every_op_is_here():
    folders = {path.parent.name for path in Path(kernels.__file__).parent.glob("*/reference.py")}
    assert folders | {"ragged_append"} == set(OPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # bfloat16 has no complex type, so no bit
@pytest.mark.parametrize("name", OPS)
def test_the_negative_bit_counts(name, dtype):
    run, (floats, integers) = OPS[name].run, tensors_of(name, dtype)
    expected = called(run, [each.clone() for each in floats], integers)
    for i in range(len(floats)):
        inputs = [negated(t) if i == changed else t.clone() for changed, t in enumerate(floats)]
        for found, exact in zip(called(run, inputs, integers), expected, strict=True):
            torch.testing.assert_close(found, exact, msg=f"argument {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_memory_that_no_vector_is_aligned_to(name, dtype):
    run, (floats, integers) = OPS[name].run, tensors_of(name, dtype)
    expected = called(run, [each.clone() for each in floats], integers)
    found = called(run, [misaligned(each) for each in floats], [misaligned(each) for each in integers])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_no_rows_at_all(name, dtype):
    op = OPS[name]
    floats, integers = without_rows(name, dtype)
    before = [floats[i].clone() for i in op.writes]
    whole = called(op.run, *(list(each) for each in tensors_of(name, dtype)))
    found = called(op.run, floats, integers)
    assert [each.ndim for each in found] == [each.ndim for each in whole]
    caches = [any(each is floats[i] for i in op.writes) for each in found]
    assert all(is_cache or not each.numel() for each, is_cache in zip(found, caches, strict=True))
    assert all(torch.equal(floats[i], other) for i, other in zip(op.writes, before, strict=True))


@pytest.mark.parametrize("end", [ENDS.min, ENDS.max, -1])
@pytest.mark.parametrize(
    ("name", "index", "named"),
    [
        ("ragged_attention", 0, "slots"),
        ("ragged_attention", 1, "positions"),
        ("ragged_append", 0, "slots"),
        ("ragged_append", 1, "positions"),
        ("rotary_append", 0, "slots"),
        ("rotary_append", 1, "positions"),
        ("rotary_append", 2, "lanes.adapters"),
        ("add_rms_norm", 0, "lanes.adapters"),
        ("gated_mul", 0, "lanes.adapters"),
        ("arm_logps", 0, "label"),
    ],
)
def test_indices_that_there_are_not_are_refused(name, index, named, end):
    if named == "lanes.adapters" and end == -1:
        end = 2
    floats, integers = tensors_of(name, torch.float32)
    integers[index].view(-1)[0] = end
    before = [each.clone() for each in floats]
    with pytest.raises(ValueError, match=named):
        called(OPS[name].run, floats, integers)
    assert all(torch.equal(one, other) for one, other in zip(floats, before, strict=True))


@pytest.mark.parametrize("op", [guided_sample, guided_sample_reference])
def test_seeds_positions_and_filters_at_the_ends(op):
    base = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    ends = torch.tensor([ENDS.min, ENDS.max, -1, 0])
    found = [
        op(base, (), [], seeds=seeds, positions=positions, top_k=top_k).tokens.tolist()
        for seeds, positions, top_k in (
            (ends, ends, 0),
            (ends, ends, ENDS.max),
            (ends, ends, torch.full((4,), ENDS.max)),
        )
    ]
    assert found[0] == found[1] == found[2]
    expected = guided_sample_reference(base, (), [], seeds=ends, positions=ends)
    assert found[0] == expected.tokens.tolist()
    none = op(base, (), [], seeds=ends, positions=ends, top_k=torch.full((4,), ENDS.min))  # all tokens, like 0
    assert none.tokens.tolist() == expected.tokens.tolist()


def test_the_conjugate_bit_counts():
    """Only ragged_append takes complex numbers: it copies entries of every dtype."""
    keys, new = torch.zeros(2, 1, 5, 4, dtype=torch.complex64), torch.randn(1, 1, 2, 4, dtype=torch.complex64)
    values = keys.clone()
    ragged_append(keys, values, new.conj(), new, torch.tensor([1]), torch.tensor([[2, 3]]))
    assert torch.equal(keys[1, :, 2:4], new[0].conj().resolve_conj())
    assert torch.equal(values[1, :, 2:4], new[0])


@pytest.mark.parametrize("block", [(), (2,), (0,)])
@pytest.mark.parametrize("op", [guided_sample, guided_sample_reference])
def test_no_rows_to_sample(op, block):
    base = torch.zeros(0, *block, 30)
    filters = {"top_k": torch.zeros(0, dtype=torch.int64), "top_p": torch.ones(0), "logit_bias": torch.zeros(0, 30)}
    positions = torch.zeros(0, *block, dtype=torch.int64)
    drawn = op(base, (base,), torch.zeros(0, 1), seeds=1, positions=positions, top_logprobs=2, **filters)
    assert [tuple(field.shape) for field in drawn] == [
        (0, *block), (0, *block), (0, *block), (2, 0, *block), (0, *block, 2), (0, *block, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("op", [settle, settle_reference])
def test_lengths_at_the_ends_of_int64(op):
    cases = [  # length, limit, tokens settled of three right drafts and a bonus token, finished
        (0, ENDS.max, 4, False),
        (ENDS.max - 2, ENDS.max, 2, True),
        (ENDS.max, ENDS.max, 0, True),
        (-5, ENDS.max, 4, False),
        (ENDS.min, ENDS.max, 4, False),
        (ENDS.min, ENDS.min + 3, 3, True),
        (5, ENDS.min, 0, True),
        (ENDS.max, ENDS.min, 0, True),
    ]
    lengths, limits, counts, finished = zip(*cases, strict=True)
    rows = len(cases)
    targets = torch.arange(4).repeat(rows, 1)
    found = op(
        targets, targets[:, :3], lengths=torch.tensor(lengths), limits=torch.tensor(limits),
        finished=torch.zeros(rows, dtype=torch.bool), stop_ids=torch.tensor([ENDS.min]),
        draft_counts=torch.full((rows,), ENDS.max),
    )  # fmt: skip
    assert found.counts.tolist() == list(counts)
    assert found.finished.tolist() == list(finished)
    assert found.lengths.tolist() == [length + count for length, count in zip(lengths, counts, strict=True)]


def test_a_default_device_is_not_where_tensors_are():
    """No op makes a tensor on the default device by mistake. On "meta", which stands for a GPU, it has no values."""
    logits, weight = torch.randn(2, 1500, dtype=torch.bfloat16), torch.randn(8, 64).to(torch.bfloat16)
    codes = dequantize(quantize(weight, 4)).to(torch.bfloat16)
    calls = (
        lambda: guided_sample(logits, (logits,), [0.5], seeds=7, positions=0, top_k=5, return_logprobs=True),
        lambda: quantize(weight, 8),
        lambda: exact_in_pytorch(codes, 4),
        lambda: QuantLinear(quantize(weight, 8)).sample(4),
    )
    expected = [call() for call in calls]
    torch.set_default_device("meta")
    try:
        found = [call() for call in calls]
    finally:
        torch.set_default_device(None)
    for one, other in zip(expected, found, strict=True):
        for first, second in zip(one, other, strict=True):
            assert first is second is None or torch.equal(first, second)
