"""guided_sample and its reference agree with hand-worked cases and brute force."""

import math

import numpy as np
import pytest
import torch

from genarm_fast.kernels import guided_sample, guided_sample_reference, gumbel
from genarm_fast.kernels.guided_sample.reference import ALL_MASKED, TILE, combine, member_logprob, threshold
from genarm_fast.kernels.philox import TILE_LEVEL, TOKEN_LEVEL

INF = math.inf


@pytest.fixture(params=[guided_sample_reference, guided_sample], ids=["reference", "dispatcher"])
def sample(request):
    return request.param


def logs(*probs):
    return torch.tensor(probs, dtype=torch.float32).log()[None]


def support(sample, base, arms=(), weights=(), draws=400, **options):
    """Return the set of tokens that are ever drawn from one row of logits."""
    rows = [logits.expand(draws, -1) for logits in (base, *arms)]
    out = sample(rows[0], rows[1:], weights, seeds=5, positions=torch.arange(draws), **options)
    assert not out.status.any()
    return set(out.tokens.tolist())


def test_hand_worked_combination(sample):
    """For π_base = (.5, .3, .2) and π_arm = (.1, .6, .3), p ∝ π_base · π_arm² is (.005, .108, .018) / .131."""
    out = sample(
        logs(0.5, 0.3, 0.2) + 3,  # shifts of the logits cancel
        (logs(0.1, 0.6, 0.3) - 7,),
        [2.0],
        temperature=0.0,
        seeds=0,
        positions=0,
        return_logprobs=True,
        top_logprobs=3,
    )
    assert out.tokens.tolist() == [1]
    assert out.top_tokens.tolist() == [[1, 2, 0]]
    expected = torch.tensor([[0.108 / 0.131, 0.018 / 0.131, 0.005 / 0.131]]).log()
    torch.testing.assert_close(out.top_logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.logprobs, expected[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.member_logprobs, torch.tensor([[0.3], [0.6]]).log(), rtol=1e-5, atol=1e-5)


def test_token_is_the_two_level_argmax(sample):
    """The token is that of the definition in float64, over three tiles, of which the last is shorter."""
    vocab, seed, position, temperature = 2 * TILE + 9, 1234567890123, 17, 0.8
    torch.manual_seed(0)
    base, arm = torch.randn(2, 1, vocab) * 3
    scores = (base.double() + 1.5 * arm.double())[0] / temperature

    def noise(level, index):
        return gumbel(torch.tensor(seed), level, torch.tensor(position), torch.tensor(index)).double()

    sums = torch.stack([tile.logsumexp(0) + noise(TILE_LEVEL, t) for t, tile in enumerate(scores.split(TILE))])
    first = int(sums.argmax()) * TILE
    tokens = range(first, min(first + TILE, vocab))
    expected = max(tokens, key=lambda x: (scores[x] + noise(TOKEN_LEVEL, x)).item())
    out = sample(base, (arm,), [1.5], temperature=temperature, seeds=seed, positions=position)
    assert out.tokens.item() == expected


def test_logprobs_match_float64(sample):
    torch.manual_seed(1)
    base, *arms = (torch.randn(5, 3000) * 4 for _ in range(3))
    weights, temperature = torch.tensor([0.7, -0.4]), 0.6
    options = {"temperature": temperature, "seeds": 9, "positions": 2}
    out = sample(base, arms, weights, return_logprobs=True, top_logprobs=4, **options)
    combined = base.double() + 0.7 * arms[0].double() - 0.4 * arms[1].double()
    logprobs = (combined / temperature).log_softmax(-1)
    torch.testing.assert_close(
        out.logprobs.double(), logprobs.gather(-1, out.tokens[:, None])[:, 0], rtol=1e-6, atol=2e-6
    )
    torch.testing.assert_close(out.top_logprobs.double(), logprobs.topk(4).values, rtol=1e-6, atol=2e-6)
    for member, got in zip((base, *arms), out.member_logprobs, strict=True):
        exact = member.double().log_softmax(-1).gather(-1, out.tokens[:, None])[:, 0]
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=2e-6)
    double = guided_sample_reference(
        base.double(), [arm.double() for arm in arms], weights, return_logprobs=True, **options
    )
    assert double.tokens.tolist() == out.tokens.tolist()
    torch.testing.assert_close(out.logprobs, double.logprobs, rtol=1e-6, atol=2e-6)


def test_greedy_ties_take_the_lowest_id(sample):
    base = torch.zeros(1, 3 * TILE)
    base[0, [5, 700, 2 * TILE + 1]] = 2.0
    assert sample(base, (), [], temperature=0, seeds=0, positions=0).tokens.tolist() == [5]
    base[0, 5] = 1.0
    out = sample(base, (), [], temperature=0, seeds=0, positions=0, top_logprobs=3)
    assert out.tokens.tolist() == [700]
    assert out.top_tokens.tolist() == [[700, 2 * TILE + 1, 5]]


def test_masked_tokens_are_never_drawn(sample):
    base, arm = logs(0.4, 0.3, 0.2, 0.1), torch.zeros(1, 4)
    base[0, 0] = -INF
    arm[0, 1] = -INF
    assert support(sample, base, (arm,), [1.0]) == {2, 3}
    assert support(sample, base, (arm,), [-1.0]) == {2, 3}  # a negative weight must not turn -inf into +inf
    assert support(sample, base, (arm,), [0.0]) == {1, 2, 3}  # an ARM that is switched off masks nothing
    assert support(sample, base, (arm,), [1.0], logit_bias=torch.tensor([9.0, 9.0, 0.0, -INF])) == {2}


def test_failing_rows_are_flagged_and_leave_the_others_alone(sample):
    torch.manual_seed(2)
    base, arm = torch.randn(6, 1500), torch.randn(6, 1500)
    good = sample(base, (arm,), [0.5], seeds=1, positions=3, return_logprobs=True)
    base[0] = -INF
    base[1, 1400] = math.nan
    arm[2, 0] = INF
    arm[3, 1499], base[3, 7] = math.nan, INF
    arm[4, 3] = math.nan  # flagged even if its weight is 0: the member is broken
    out = sample(base, (arm,), [[0.5]] * 4 + [[0.0]] + [[0.5]], seeds=1, positions=3, return_logprobs=True)
    assert out.status.tolist() == [ALL_MASKED, 2, 4, 6, 4, 0]
    assert out.tokens[:5].tolist() == [0] * 5
    assert out.logprobs[:5].isnan().all()
    assert out.member_logprobs[:, :5].isnan().all()
    assert out.tokens[5] == good.tokens[5]
    torch.testing.assert_close(out.member_logprobs[:, 5], good.member_logprobs[:, 5], rtol=0, atol=0)


@pytest.mark.parametrize("weight", [math.nan, INF])
def test_weights_that_are_not_finite_are_flagged(sample, weight):
    out = sample(torch.ones(1, 40), (torch.ones(1, 40),), [weight], seeds=0, positions=0)
    assert (out.status.item(), out.tokens.item()) == (ALL_MASKED, 0)


def kept_by_brute_force(probs, top_k, top_p, min_p):
    """Return the tokens that the definition keeps: sort, cut to k, renormalise, nucleus, min-p of the largest."""
    order = sorted(range(len(probs)), key=lambda x: -probs[x])
    if 0 < top_k < len(probs):
        order = [x for x in order if probs[x] >= probs[order[top_k - 1]]]
    total, mass, nucleus = sum(probs[x] for x in order), 0.0, []
    for x in order:
        if mass < top_p * total or probs[x] == probs[nucleus[-1]]:
            nucleus.append(x)
        mass += probs[x]
    return {x for x in nucleus if probs[x] >= min_p * probs[order[0]]}


@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.45, 0.01])
@pytest.mark.parametrize("min_p", [0.0, 0.13, 1.0])
def test_truncation_matches_brute_force(sample, top_k, top_p, min_p):
    torch.manual_seed(top_k)
    base = torch.randn(1, 12)
    base[0, 7] = base[0, 2]  # a tie
    temperature = 1.3
    probs = (base.double() / temperature).softmax(-1)[0].tolist()
    expected = kept_by_brute_force(probs, top_k, top_p, min_p)
    one = torch.ones(1)
    lowest = threshold(base, one[:, None] / temperature, torch.tensor([top_k]), one * top_p, one * min_p)
    assert set((base >= lowest)[0].nonzero()[:, 0].tolist()) == expected
    drawn = support(sample, base, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert drawn <= expected
    assert {x for x in expected if probs[x] > 0.05} <= drawn


def test_truncation_acts_on_the_combination(sample):
    base, arm = logs(0.6, 0.3, 0.1), logs(0.05, 0.05, 0.9)
    assert support(sample, base, (arm,), [1.0], top_k=1) == {2}
    assert support(sample, base, (arm,), [1.0], top_p=0.6) == {2}


def test_parameters_are_per_row(sample):
    torch.manual_seed(3)
    base, arm = torch.randn(4, 2000), torch.randn(4, 2000)
    rows = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0]),
        "top_k": torch.tensor([0, 5, 0, 100]),
        "top_p": torch.tensor([1.0, 0.5, 0.9, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.1, 0.01]),
        "seeds": torch.tensor([1, 2, 3, -4]),
        "positions": torch.tensor([9, 8, 7, 6]),
        "logit_bias": torch.randn(4, 2000),
    }
    weights = torch.tensor([[1.0], [0.0], [-1.0], [3.0]])
    together = sample(base, (arm,), weights, return_logprobs=True, **rows)
    for r in range(4):
        one = {name: value[r : r + 1] for name, value in rows.items()}
        alone = sample(base[r : r + 1], (arm[r : r + 1],), weights[r], return_logprobs=True, **one)
        assert alone.tokens.item() == together.tokens[r].item()
        assert torch.equal(alone.logprobs[0], together.logprobs[r])
        assert torch.equal(alone.member_logprobs[:, 0], together.member_logprobs[:, r])


def test_blocks_equal_single_positions(sample):
    torch.manual_seed(4)
    rows, block, vocab = 3, 4, 1300
    base, arm = torch.randn(2, rows, block, vocab).unbind()
    weights, seeds = torch.randn(rows, 1), torch.tensor([7, 8, 9])
    positions = torch.tensor([[5], [0], [90]]) + torch.arange(block)
    temperature = torch.tensor([0.0, 1.0, 0.7])
    options = {"temperature": temperature, "seeds": seeds, "return_logprobs": True, "top_logprobs": 2}
    whole = sample(base, (arm,), weights, positions=positions, **options)
    assert whole.tokens.shape == (rows, block)
    assert whole.member_logprobs.shape == (2, rows, block)
    assert whole.top_tokens.shape == (rows, block, 2)
    for i in range(block):
        single = sample(base[:, i], (arm[:, i],), weights, positions=positions[:, i], **options)
        assert single.tokens.tolist() == whole.tokens[:, i].tolist()
        assert torch.equal(single.member_logprobs, whole.member_logprobs[:, :, i])
        assert torch.equal(single.top_logprobs, whole.top_logprobs[:, i])


def test_only_the_common_vocabulary_counts(sample):
    torch.manual_seed(5)
    base, arm = torch.randn(2, 1100), torch.randn(2, 1200)
    narrow = sample(base, (arm[:, :1100],), [1.0], seeds=1, positions=0, return_logprobs=True)
    base_wide = torch.cat([base, torch.full((2, 30), 1e9)], -1)
    wide = sample(base_wide, (arm,), [1.0], seeds=1, positions=0, vocab_size=1100, return_logprobs=True)
    for name, value in narrow._asdict().items():
        other = getattr(wide, name)
        assert value is other is None or torch.equal(value, other), name


@pytest.mark.parametrize("temperature", [1e-38, 1e-6, 1e6])
def test_extreme_temperatures_stay_finite(sample, temperature):
    base = torch.tensor([[1.0, 3.0, 2.0, -500.0]])
    out = sample(base, (), [], temperature=temperature, seeds=0, positions=0, return_logprobs=True)
    assert out.status.item() == 0
    assert out.logprobs.isfinite().all()
    if temperature < 1:
        assert out.tokens.item() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_logits": torch.zeros(8)}, r"arm_logits\[0\] of shape \(2, 8\): expected a tensor \[V\]"),
        ({"base_logits": torch.zeros(2, 2, 2, 8)}, r"base_logits of shape \(2, 2, 2, 8\)"),
        ({"arm_logits": (torch.zeros(3, 8),)}, r"arm_logits\[0\] of shape \(3, 8\): expected \(2, 'V'\)"),
        ({"weights": [1.0, 2.0]}, "weights"),
        ({"weights": torch.ones(3, 1)}, "weights"),
        ({"vocab_size": 9}, r"vocab_size=9: expected 1\.\.8"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"top_logprobs": 9}, r"top_logprobs=9: expected 0\.\.8"),
        ({"temperature": -1.0}, r"temperature=-1\.0: expected"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": 1e39}, "temperature=1e\\+39"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"min_p": -0.1}, r"min_p=-0\.1"),
        ({"temperature": torch.ones(3)}, r"temperature of shape \(3,\)"),
        ({"seeds": torch.ones(2, 2, dtype=torch.int64)}, r"seeds of shape \(2, 2\)"),
        ({"seeds": 2**64}, "seeds=18446744073709551616"),
        ({"weights": np.ones((2, 3))}, r"weights of shape \(2, 3\)"),
        ({"logit_bias": torch.zeros(())}, r"logit_bias of shape \(\)"),
        ({"logit_bias": torch.zeros(5)}, r"logit_bias of shape \(5,\)"),
        ({"logit_bias": torch.zeros(3, 8)}, r"logit_bias of shape \(3, 8\)"),
    ],
)
def test_refusals_name_the_argument(sample, change, message):
    arguments = {"base_logits": torch.zeros(2, 8), "arm_logits": (torch.zeros(2, 8),), "weights": [1.0]}
    arguments |= {"seeds": 0, "positions": 0} | change
    with pytest.raises(ValueError, match=message):
        sample(arguments.pop("base_logits"), arguments.pop("arm_logits"), arguments.pop("weights"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_logits": torch.zeros(2, 8, dtype=torch.int64)}, "base_logits of dtype torch.int64"),
        ({"base_logits": np.zeros((2, 8))}, "base_logits of <class 'numpy.ndarray'>: expected a tensor"),
        ({"arm_logits": (None,)}, r"arm_logits\[0\] of <class 'NoneType'>: expected a tensor"),
        ({"weights": None}, "weights=None: expected a tensor or a list"),
        ({"logit_bias": {3: 1.0}}, "logit_bias of <class 'dict'>: expected a tensor"),
        ({"temperature": "1"}, "temperature='1': expected a number"),
        ({"temperature": [1.0, 1.0]}, r"temperature=\[1.0, 1.0\]: expected a number"),
        ({"top_p": np.ones(2)}, r"top_p=array\(\[1., 1.\]\): expected a number"),
        ({"top_k": 2.5}, "top_k=2.5: expected an integer"),
        ({"top_k": torch.ones(2)}, "top_k of dtype torch.float32: expected integers"),
        ({"seeds": 1.0}, "seeds=1.0: expected an integer"),
        ({"seeds": torch.ones(2)}, "seeds of dtype torch.float32: expected integers"),
        ({"positions": 1.5}, "positions=1.5: expected an integer"),
        ({"vocab_size": 4.0}, "vocab_size=4.0: expected an integer"),
        ({"top_logprobs": None}, "top_logprobs=None: expected an integer"),
    ],
)
def test_other_types_are_refused(sample, change, message):
    arguments = {"base_logits": torch.zeros(2, 8), "arm_logits": (torch.zeros(2, 8),), "weights": [1.0]}
    arguments |= {"seeds": 0, "positions": 0} | change
    with pytest.raises(TypeError, match=message):
        sample(arguments.pop("base_logits"), arguments.pop("arm_logits"), arguments.pop("weights"), **arguments)


def test_what_tensors_should_not_hold_stays_in_the_row(sample):
    """Values in tensors are not checked, so wrong ones must not give a token outside the vocabulary, or a crash."""
    odd = torch.tensor([math.nan, math.inf, -math.inf, -5.0, 2.0])
    flat = torch.zeros(5, 16)[:, :10]
    for name in ("temperature", "top_p", "min_p"):
        for rest in ({}, {"top_p": 0.5}, {"top_k": 3}):
            drawn = sample(flat, (), [], seeds=1, positions=0, return_logprobs=True, **(rest | {name: odd}))
            assert ((drawn.tokens >= 0) & (drawn.tokens < 10)).all()


def test_helpers_upcast_half_precision():
    """The engine also calls combine and member_logprob directly, on the members' own logits."""
    generator = torch.Generator().manual_seed(0)
    base, arm = (2 * torch.randn(2, 3, 50, generator=generator)).bfloat16()
    combined, _ = combine(base, [arm], torch.tensor([0.3]))
    torch.testing.assert_close(combined, base.float() + 0.3 * arm.float())
    tokens = torch.tensor([4, 0, 49])
    torch.testing.assert_close(
        member_logprob(base, tokens), base.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    )


@pytest.mark.parametrize("off", [{"top_k": 0, "top_p": 1.0, "min_p": 0.0}, {}], ids=["numbers", "None"])
@pytest.mark.parametrize("filters", [{}, {"top_k": torch.tensor([2, 0])}, {"top_p": torch.tensor([0.5, 1.0])}])
def test_filters_that_are_off(sample, off, filters):
    """A filter is off if it is None, also beside a tensor for another filter, or a tensor of values that keep all."""
    base = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    options = {"seeds": 5, "positions": torch.arange(6).view(2, 3), "top_logprobs": 2}
    none = {"top_k": torch.zeros(2, dtype=torch.int64), "top_p": torch.ones(2), "min_p": torch.zeros(2)}
    expected = sample(base, (), [], **options, **(none | filters))
    found = sample(base, (), [], **options, **({"top_k": None, "top_p": None, "min_p": None} | off | filters))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("block", [(), (3,)], ids=["[R, V]", "[R, q, V]"])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.99, "min_p": 0.01}])
def test_a_bias_by_row_masks_tokens(sample, block, filters):
    """The bias leaves each row its own two tokens, at every position, with the odds that it gives them."""
    kept = torch.tensor([[3, 40], [7, 1030], [1500, 1501]])
    bias = torch.full((3, 1600), -INF).scatter_(1, kept, torch.tensor([[0.0, 1.0]]).expand(3, 2))
    base = torch.randn(3, *block, 1600, generator=torch.Generator().manual_seed(0)) / 10
    options = {"logit_bias": bias, "positions": 0, "return_logprobs": True} | filters
    seen = [set() for _ in kept]
    for seed in range(40):
        drawn = sample(base, (base / 2,), [1.0], seeds=seed, **options)
        assert not drawn.status.any()
        spread = bias.view(3, *(1 for _ in block), 1600)
        exact = (1.5 * base + spread).log_softmax(-1).gather(-1, drawn.tokens[..., None])[..., 0]
        torch.testing.assert_close(drawn.logprobs, exact, rtol=1e-5, atol=1e-5)
        for row, tokens in zip(seen, drawn.tokens.reshape(3, -1).tolist(), strict=True):
            row.update(tokens)
    assert [sorted(row) for row in seen] == kept.tolist()


def test_a_bias_that_masks_a_whole_row_is_told(sample):
    bias = torch.zeros(2, 1100)
    bias[1] = -INF
    drawn = sample(torch.zeros(2, 2, 1100), (), [], seeds=1, positions=0, logit_bias=bias)
    assert drawn.status.tolist() == [[0, 0], [ALL_MASKED, ALL_MASKED]]
