"""Short calls of guided_sample, as people write them in their own loops in place of `softmax` and `multinomial`."""

import pytest
import torch

from genarm_fast.kernels import guided_sample, guided_sample_reference

V = 300


@pytest.fixture(params=[guided_sample, guided_sample_reference])
def sample(request):
    return request.param


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, V, generator=generator) * 3 for _ in range(3)]


def equal(one, other):
    return all(torch.equal(a, b) if a is not None else b is None for a, b in zip(one, other))


OPTIONS = {"seeds": 7, "positions": 3, "return_logprobs": True, "top_logprobs": 2}


def test_one_arm_and_one_weight(sample, logits):
    base, arm, other = logits
    expected = sample(base, (arm,), [0.5], **OPTIONS)
    for weight in (0.5, torch.tensor(0.5), torch.tensor([0.5]), (0.5,)):
        assert equal(sample(base, arm, weight, **OPTIONS), expected)
    both = sample(base, (arm, other), [0.5, 0.5], **OPTIONS)
    assert equal(sample(base, torch.stack([arm, other]), 0.5, **OPTIONS), both)
    assert equal(sample(base, [arm, other], torch.tensor(0.5), **OPTIONS), both)
    assert equal(sample(base, **OPTIONS), sample(base, (), [], **OPTIONS))


def test_one_row(sample, logits):
    base, arm, _ = logits
    expected = sample(base[:1], (arm[:1],), [0.5], **OPTIONS)
    found = sample(base[0], arm[0], 0.5, **OPTIONS)
    assert found.tokens.shape == found.logprobs.shape == found.status.shape == ()
    assert found.member_logprobs.shape == found.top_tokens.shape == (2,)
    assert int(found.tokens) == int(expected.tokens)
    assert torch.equal(found.member_logprobs, expected.member_logprobs[:, 0])
    assert torch.equal(found.top_logprobs, expected.top_logprobs[0])


def test_without_seeds(sample, logits):
    """PyTorch's generator, or a given one, makes tokens reproducible. Every call and every row has its own noise."""
    base, arm = torch.zeros(64, V), torch.zeros(64, V)
    torch.manual_seed(1)
    first, second = (sample(base, arm, 1.0).tokens for _ in range(2))
    assert not torch.equal(first, second)
    assert len(set(first.tolist())) > 30
    torch.manual_seed(1)
    assert torch.equal(sample(base, arm, 1.0).tokens, first)
    drawn = [sample(base, generator=torch.Generator().manual_seed(seed)).tokens for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_law_without_seeds(sample):
    """20,000 draws of 8 tokens follow the softmax by chi-squared, and draws at another temperature do not."""
    torch.manual_seed(0)
    base, arm = torch.randn(2, 8)
    rows = 20_000
    tokens = sample(base.expand(rows, 8), arm.expand(rows, 8), 0.7, temperature=0.9).tokens
    counts = torch.bincount(tokens, minlength=8).double()

    def distance(temperature):
        expected = ((base + 0.7 * arm) / temperature).double().softmax(0) * rows
        return float(((counts - expected) ** 2 / expected).sum())

    assert distance(0.9) < 24.3  # 0.999 quantile, 7 degrees of freedom
    assert distance(1.2) > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 1}, "positions: expected with seeds"),
        ({"seeds": 1, "positions": 0, "generator": torch.Generator()}, "generator: expected none where seeds"),
    ],
)
def test_refused(sample, logits, options, message):
    with pytest.raises(TypeError, match=message):
        sample(logits[0], **options)
    with pytest.raises(TypeError, match="base_logits of <class 'list'>: expected a tensor"):
        sample([1.0, 2.0])


@pytest.mark.parametrize("which", ["base_logits", r"arm_logits\[0\]"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda logits: logits.to_sparse(), "of layout torch.sparse_coo: expected a dense tensor"),
        (lambda logits: logits.to(torch.float8_e4m3fn), "of dtype torch.float8_e4m3fn: expected floating point of 16"),
        (lambda logits: logits.to(torch.complex64), "of dtype torch.complex64: expected floating point"),
    ],
)
def test_tensors_that_no_kernel_reads(which, change, said):
    base, arm = torch.randn(2, 16), torch.randn(2, 16)
    base, arm = (change(base), arm) if which == "base_logits" else (base, change(arm))
    with pytest.raises(TypeError, match=f"{which} {said}"):
        guided_sample(base, arm, 1.0)
