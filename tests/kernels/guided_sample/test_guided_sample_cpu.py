"""The C++ core gives the reference's tokens on every instruction set, and its log-probabilities to float32 rounding."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genarm_fast.kernels import _native, guided_sample, guided_sample_reference
from genarm_fast.kernels.guided_sample.arguments import SamplingArguments
from genarm_fast.kernels.guided_sample.reference import member_logprob

pytestmark = pytest.mark.skipif(_native.core is None, reason="built without a compiler")
VOCABS = [1, 2, 17, 999, 1024, 1025, 32001, 50257, 128256, 151936]
CYCLE = [torch.float32, torch.bfloat16, torch.float16]


def members(rows, vocab, arms, *, seed=0, scale=3.0, mixed=True):
    generator = torch.Generator().manual_seed(seed)
    logits = [scale * torch.randn(rows, vocab + 3 * i, generator=generator) for i in range(arms + 1)]
    return [z.to(CYCLE[i % 3]) if mixed else z for i, z in enumerate(logits)]


def assert_same(logits, weights, *, atol=1e-5, **options):
    """Tokens and status are the reference's, and log-probabilities are within float32 rounding of float64."""
    base, *arms = logits
    got = guided_sample(base, arms, weights, **options)
    expected = guided_sample_reference(base, arms, weights, **options)
    assert got.tokens.tolist() == expected.tokens.tolist()
    assert got.status.tolist() == expected.status.tolist()
    if got.logprobs is None:
        return
    exact = guided_sample_reference(base.double(), [arm.double() for arm in arms], weights, **options)
    for name in ("logprobs", "member_logprobs", "top_logprobs"):
        if getattr(got, name) is not None:
            torch.testing.assert_close(
                getattr(got, name), getattr(exact, name), rtol=2e-6, atol=atol, equal_nan=True, msg=name
            )
    if got.top_tokens is not None:
        assert got.top_tokens.tolist() == expected.top_tokens.tolist()


@pytest.mark.parametrize("vocab", VOCABS)
def test_vocabularies(isa, vocab):
    rows = 4 if vocab > 2000 else 40
    temperature = torch.linspace(0, 1.5, rows)
    options = {"temperature": temperature, "seeds": torch.arange(rows) * 10**15, "positions": 7}
    assert_same(members(rows, vocab, 2), [0.7, -0.3], return_logprobs=True, top_logprobs=min(vocab, 5), **options)


@pytest.mark.parametrize("arms", range(9))
def test_numbers_of_arms(isa, arms):
    weights = torch.linspace(-0.5, 1.5, 6 * arms).reshape(6, arms)
    assert_same(members(6, 1500, arms), weights, seeds=3, positions=torch.arange(6), return_logprobs=True)


@pytest.mark.parametrize("vocab", [17, 1025, 50257])
def test_filters(isa, vocab):
    rows = 12
    top_k = torch.tensor([0, 1, 2, 5, 50, 900, 20000, 60000, 0, 0, 40, 3])
    top_p = torch.tensor([0.9, 1.0, 0.5, 0.7, 0.95, 0.99, 0.999, 1.0, 0.0, 1.0, 1.0, 0.9])
    min_p = torch.tensor([0.0, 0.1, 0.0, 0.0, 0.01, 0.0, 0.0, 0.0, 0.0, 0.05, 1.0, 0.0])
    for seed in range(3):
        options = {"temperature": 1.7, "seeds": seed, "positions": torch.arange(rows), "top_k": top_k}
        assert_same(
            members(rows, vocab, 1, seed=seed), [1.0], top_p=top_p, min_p=min_p, top_logprobs=min(vocab, 30), **options
        )


def test_flat_and_tied_rows(isa):
    """With all scores equal, or one of three values, every pivot is tied."""
    base = torch.zeros(3, 5000)
    base[1] = torch.arange(5000) % 3
    base[2, 4999] = 1
    for filters in ({}, {"top_k": 7}, {"top_p": 0.4}, {"top_k": 2000, "top_p": 0.5, "min_p": 0.3}):
        assert_same([base], [], seeds=1, positions=torch.arange(3), top_logprobs=9, **filters)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
def test_tiles_whose_first_logits_say_little_of_the_others(isa, temperature):
    """One-pass sums take their reference value from a tile's first logits. A sum that overflows is computed again."""
    base, arm = members(6, 2500, 1, mixed=False)
    base[0].view(-1, 20)[::5, :16] = -math.inf
    base[1, ::1024] = -150
    base[1, :16] = base[1, 1024:1040] = -150
    base[1, [700, 2400]] = torch.tensor([150.0, 151.0])
    base[2] += 3000
    base[3] -= 1e4
    base[4] = 88
    arm[5] *= 40
    options = {"temperature": temperature, "seeds": 2, "positions": torch.arange(6)}
    for logits in (base, base.bfloat16()):
        assert_same([logits], [], return_logprobs=True, atol=1e-5 / min(temperature, 1), **options)
        assert_same([logits], [], top_logprobs=2, atol=1e-5 / min(temperature, 1), top_p=0.8, **options)
    for weight in (1.0, -0.5, 0.0):  # c is rounded, so only the members' own log-probabilities are exact
        got = guided_sample(base, (arm,), [weight], return_logprobs=True, **options)
        assert_same([base, arm], [weight], **options)
        for logits, found in zip((base, arm[:, :2500]), got.member_logprobs, strict=True):
            exact = member_logprob(logits.double(), got.tokens)
            torch.testing.assert_close(found, exact, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("logprobs", [True, False])
def test_broken_members_are_flagged_wherever_they_break(isa, weight, logprobs):
    base, arm = (z[:4] for z in members(4, 1100, 1, mixed=False))
    arm[0, 1050], arm[1, 3] = math.inf, math.nan
    base[2, 1099], base[3, 500], arm[3, 500] = math.nan, math.inf, -math.inf
    options = {"seeds": 2, "positions": 0, "return_logprobs": logprobs}
    assert_same([base, arm], [weight], **options)
    assert guided_sample(base, (arm,), [weight], **options).status.tolist() == [4, 4, 2, 2]


def test_strides(isa):
    wide = 3 * torch.randn(2, 3, 2, 2000, generator=torch.Generator().manual_seed(1))
    views = [wide[:, :, 0, 5:1205], wide[:, :, 1, 300:1500], wide.flip(0)[0, 0, 0, :1200].expand(2, 3, 1200)]
    views.append(wide.movedim(-1, 0)[:1200, ..., 1].movedim(0, -1))
    positions = torch.arange(12).view(2, 6)[:, ::2]  # strided parameters too
    assert_same(views, [0.5, 0.2, -0.1], seeds=torch.arange(4)[::2], positions=positions, return_logprobs=True)
    assert_same([views[-1][:, 0]], [], temperature=torch.ones(4).double()[::2], seeds=0, positions=0)


@pytest.mark.parametrize("filters", [{}, {"top_k": 9, "top_p": 0.9}])
@pytest.mark.parametrize("dtype", CYCLE)
def test_a_bias_of_minus_infinity(isa, filters, dtype):
    """Each row's bias masks single tokens, whole tiles or the first part of a tile, at every position."""
    wide = 3 * torch.randn(2, 3, 2500, generator=torch.Generator().manual_seed(4))
    bias = torch.randn(2, 2500, generator=torch.Generator().manual_seed(5))
    bias[0, 1024:2048], bias[1, :700], bias[1, ::2] = -math.inf, -math.inf, -math.inf
    options = {"seeds": torch.arange(2), "positions": torch.arange(6).view(2, 3), "temperature": 2.0}
    for logits, weights in (([wide], []), ([wide, wide / 2], [0.5])):
        members = [z.to(dtype) for z in logits]
        assert_same(members, weights, logit_bias=bias, return_logprobs=True, **options, **filters)
        drawn = guided_sample(members[0], members[1:], weights, logit_bias=bias, **options, **filters)
        assert bias.gather(1, drawn.tokens).isfinite().all()


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9, "top_logprobs": 3}])
def test_threads_do_not_change_the_tokens(rows, filters):
    """Threads share the rows, or the tiles of a single row."""
    logits = [z[:rows] for z in members(9, 151936, 3)]
    logits[0][:, 5000:9000] = -math.inf
    options = {"seeds": 5, "positions": torch.arange(rows), "return_logprobs": True, **filters}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        many = [guided_sample(logits[0], logits[1:], [1.0, 0.5, -0.5], **options) for _ in range(5)]
        torch.set_num_threads(1)
        one = guided_sample(logits[0], logits[1:], [1.0, 0.5, -0.5], **options)
    finally:
        torch.set_num_threads(before)
    for found in many:
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(found, one, strict=True))


PREPARED = SamplingArguments(
    base_logits=torch.zeros(2, 40),
    arm_logits=(torch.zeros(2, 40).bfloat16(),),
    weights=torch.ones(2, 1),
    seeds=2**64 - 1,
    positions=torch.tensor(3),
    temperature=torch.ones(2),
    top_k=torch.zeros(2, dtype=torch.int64),
    top_p=torch.ones(2),
    min_p=0.0,
    return_logprobs=True,
)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"arm_logits": [torch.zeros(2, 41).half()], "weights": [0.5], "vocab_size": 7, "top_logprobs": 7},
        {"top_k": None, "top_p": None, "min_p": None},
        {"top_k": None, "min_p": torch.zeros(2)},
        {"base_logits": torch.zeros(2, 80)[:, 40:], "logit_bias": torch.zeros(2, 50), "temperature": 0, "top_k": 5},
    ],
)
def test_core_takes_prepared_arguments_at_once(change):
    assert _native.core.guided_sample(*PREPARED._replace(**change)) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"base_logits": torch.zeros(40)},
        {"base_logits": torch.zeros(2, 40, device="meta")},
        {"base_logits": torch.zeros(2, 40).double()},
        {"base_logits": torch.zeros(40, 2).T},
        {"base_logits": torch.nn.Parameter(torch.zeros(2, 40))},
        {"base_logits": None},
        {"arm_logits": (torch.zeros(3, 40),)},
        {"arm_logits": (torch.zeros(2, 1, 40),)},
        {"arm_logits": torch.zeros(1, 2, 40)},
        {"weights": torch.ones(2)},
        {"weights": torch.ones(2, 1).double()},
        {"weights": [1.0, 2.0]},
        {"weights": [[1.0], [2.0]]},
        {"vocab_size": 41},
        {"vocab_size": 0},
        {"logit_bias": torch.zeros(39)},
        {"logit_bias": torch.zeros(1, 40)},
        {"top_logprobs": 41},
        {"top_logprobs": -1},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": torch.ones(3)},
        {"temperature": torch.ones(2, dtype=torch.int64)},
        {"temperature": 10**400},
        {"top_k": -1},
        {"top_k": 2**63},
        {"top_k": 1.0},
        {"temperature": None},
        {"seeds": None},
        {"top_p": 1.5},
        {"min_p": "0"},
        {"seeds": 2**64},
        {"seeds": torch.ones(2, 1, dtype=torch.int64)},
        {"positions": 2**32},
    ],
)
def test_core_leaves_what_it_cannot_take(change):
    """The core returns None and leaves no error set. Then Python converts the arguments, or refuses one by name."""
    assert _native.core.guided_sample(*PREPARED._replace(**change)) is None


def test_converted_arguments_give_the_same_draw():
    base, arm = members(4, 300, 1, mixed=False)
    options = {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "seeds": 3, "positions": torch.arange(4)}
    expected = guided_sample(base, (arm,), [0.5], return_logprobs=True, **options)
    options |= {"temperature": torch.full((4,), 0.7).double(), "top_k": torch.full((4,), 50).int()}
    found = guided_sample(
        torch.nn.Parameter(base), (arm.T.contiguous().T,), ((0.5,),) * 4, return_logprobs=True, **options
    )
    assert all(torch.equal(x, y) for x, y in zip(expected[:4], found[:4], strict=True))


def test_numbers_of_numpy_do_not_leave_the_core(monkeypatch):
    base, arm = members(4, 300, 1, mixed=False)
    options = {"temperature": 0.5, "top_k": 50, "top_p": 0.5, "min_p": 0.25, "seeds": 2**64 - 1, "positions": 3}
    options |= {"vocab_size": 290, "top_logprobs": 2}
    expected = guided_sample(base, (arm,), [0.5], **options)
    kinds = (np.float32, np.int64, np.float64, np.float32, np.uint64, np.uint8, np.int64, np.int32)
    monkeypatch.setattr(sys.modules["genarm_fast.kernels.guided_sample.reference"], "sample_tiles", None)
    options = {name: kind(value) for kind, (name, value) in zip(kinds, options.items(), strict=True)}
    found = guided_sample(base, (arm,), np.array([0.5]), **options)
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


VALUES = st.sampled_from([0.0, -0.0, 1.0, 2.5, -3.0, 300.0, -300.0, 1e-30, -math.inf])


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_fuzz(data):
    rows = data.draw(st.integers(1, 4), "rows")
    block = data.draw(st.integers(0, 3), "block")  # 0 stands for no block dimension
    vocab = data.draw(st.integers(1, 2100), "vocab")
    arms = data.draw(st.integers(0, 3), "arms")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20), "noise"))
    shape = (rows, block) if block else (rows,)
    logits = []
    for i in range(arms + 1):
        z = torch.randn(*shape, vocab + i, generator=generator) * data.draw(st.sampled_from([0.1, 2.0, 20.0]), "scale")
        for value in data.draw(st.lists(VALUES, max_size=4), "specials"):
            z[..., data.draw(st.integers(0, vocab - 1), "index")] = value
        logits.append(z.to(data.draw(st.sampled_from(CYCLE), "dtype")))

    def parameter(values, dtype):
        one = data.draw(st.booleans())
        return data.draw(values) if one else torch.tensor([data.draw(values) for _ in range(rows)], dtype=dtype)

    options = {
        "temperature": parameter(st.sampled_from([0.0, 0.3, 1.0, 4.0]), torch.float32),
        "top_k": parameter(st.sampled_from([0, 1, 3, 100, 5000]), torch.int64),
        "top_p": parameter(st.sampled_from([1.0, 0.9, 0.3]), torch.float32),
        "min_p": parameter(st.sampled_from([0.0, 0.05]), torch.float32),
        "seeds": parameter(st.integers(0, 2**63 - 1), torch.int64),
        "positions": parameter(st.integers(0, 2**20), torch.int64),
        "top_logprobs": data.draw(st.integers(0, min(vocab, 4)), "top_logprobs"),
        "vocab_size": data.draw(st.sampled_from([None, (vocab + 1) // 2]), "vocab_size"),
    }
    options["top_logprobs"] = min(options["top_logprobs"], options["vocab_size"] or vocab)
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.5, -1.0, 2.0]), min_size=arms, max_size=arms), "weights")
    assert_same(logits, weights, atol=1e-3, return_logprobs=True, **options)  # 300 / T leaves few digits
