"""Every op takes tensors with PyTorch's negative bit, tensors of zero rows, and numbers at the ends of int64."""

import pytest
import torch

from genarm_fast.kernels import (
    Lora,
    SiblingLinears,
    SmallLinear,
    _native,
    arm_logps,
    guided_sample,
    guided_sample_reference,
    ragged_append,
    ragged_attention,
    rms_norm,
    rotary,
    settle,
    settle_reference,
    silu_mul,
    small_linear,
)

ENDS = torch.iinfo(torch.int64)


@pytest.fixture(params=["core", "without"], autouse=True)
def core(request, monkeypatch):
    if request.param == "without":
        monkeypatch.setattr(_native, "core", None)
    elif _native.core is None:
        pytest.skip("built without a compiler")


def negated(tensor):
    """A tensor equal to this one, with its strides, whose memory holds the opposite."""
    out = torch._neg_view(tensor.neg())
    assert out.is_neg()
    assert torch.equal(out, tensor)
    assert out.stride() == tensor.stride()
    return out


def sample(base, arm, weights, temperature, top_p, min_p, bias):
    drawn = guided_sample(
        base, (arm,), weights, temperature=temperature, top_p=top_p, min_p=min_p, logit_bias=bias, seeds=1, positions=0,
        top_logprobs=2,
    )  # fmt: skip
    return tuple(drawn)


def append(keys, values, new_keys, new_values):
    ragged_append(keys, values, new_keys, new_values, torch.tensor([1]), torch.tensor([[2, 3]]))
    return keys, values


def linear(x, weight, bias, a, b):
    whole = SmallLinear(weight, bias, [Lora(a, b, 0.5)])
    one = small_linear(x, weight, bias, loras=[(0, 1, a, b, 0.5)])
    return whole(x, [(0, 1, 0)]), one, *SiblingLinears([whole])(x, [()])


def attend(query, keys, values):
    return ragged_attention(query, keys, values, torch.tensor([1]), torch.tensor([[2, 3]]), scale=0.5)


OPS = {  # the op and the shapes of its floating-point tensors
    "guided_sample": (sample, [(3, 50), (3, 51), (3, 1), (3,), (3,), (3,), (3, 50)]),
    "ragged_attention": (attend, [(1, 4, 2, 8), (2, 2, 5, 8), (2, 2, 5, 8)]),
    "ragged_append": (append, [(2, 2, 5, 8), (2, 2, 5, 8), (1, 2, 2, 8), (1, 2, 2, 8)]),
    "rms_norm": (lambda x, weight: rms_norm(x, weight, 1e-5), [(2, 16), (16,)]),
    "rotary": (rotary, [(1, 2, 2, 8), (1, 1, 2, 8), (1, 2, 8), (1, 2, 8)]),
    "silu_mul": (silu_mul, [(2, 16), (2, 16)]),
    "small_linear": (linear, [(2, 32), (16, 32), (16,), (2, 32), (2, 16)]),
    "arm_logps": (lambda h, w, b: arm_logps(h, w, torch.tensor([[1, 2]]), bias=b), [(1, 2, 8), (9, 8), (9,)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # bfloat16 has no complex counterpart, so no bit
@pytest.mark.parametrize("name", OPS)
def test_the_negative_bit_counts(name, dtype):
    op, shapes = OPS[name]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(shape, generator=generator).to(dtype) for shape in shapes]

    def result(changed=None):
        inputs = [negated(t) if i == changed else t.clone() for i, t in enumerate(tensors)]
        with torch.inference_mode():
            out = op(*inputs)
        return [out] if isinstance(out, torch.Tensor) else out

    expected = result()
    for i in range(len(tensors)):
        for found, exact in zip(result(i), expected, strict=True):
            torch.testing.assert_close(found, exact, msg=f"argument {i}")


def test_the_conjugate_bit_counts():
    """ragged_append copies entries of every dtype."""
    keys, new = torch.zeros(2, 1, 5, 4, dtype=torch.complex64), torch.randn(1, 1, 2, 4, dtype=torch.complex64)
    values = keys.clone()
    append(keys, values, new.conj(), new)
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


def test_no_rows():
    none, cache = torch.zeros(0, dtype=torch.int64), torch.randn(2, 2, 5, 8)
    nobody = torch.zeros(0, 2, 1, 8)
    places = none, none.view(0, 1)
    assert ragged_attention(nobody, cache, cache, *places, scale=1.0).shape == (0, 1, 2, 8)
    before = cache.clone()
    ragged_append(cache, cache.clone(), nobody, nobody, *places)
    assert torch.equal(cache, before)
    assert rms_norm(torch.zeros(0, 16), torch.ones(16), 1e-5).shape == (0, 16)
    assert silu_mul(torch.zeros(0, 16), torch.zeros(0, 16)).shape == (0, 16)
    assert [x.shape[0] for x in rotary(nobody, nobody, torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))] == [0, 0]
    weight = torch.zeros(16, 32).bfloat16()
    assert small_linear(torch.zeros(0, 32).bfloat16(), weight).shape == (0, 16)
    assert arm_logps(torch.zeros(0, 2, 8), torch.zeros(9, 8), none.view(0, 1).expand(0, 2)).shape == (0,)
    rest = {"lengths": none, "limits": none, "finished": none.bool(), "stop_ids": torch.tensor([1])}
    for op in (settle, settle_reference):
        assert [len(field) for field in op(torch.zeros(0, 3).long(), torch.zeros(0, 2).long(), **rest)] == [0] * 4


@pytest.mark.parametrize("op", [settle, settle_reference])
def test_lengths_at_the_ends_of_int64(op):
    cases = [  # length, limit → how many of three right drafts and a bonus are settled, finished
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
