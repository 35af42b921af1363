"""Draws follow the guided distribution, and the tests of that fail for the mistakes that they should catch."""

import importlib
import math

import pytest
import torch

from genarm_fast.kernels import guided_sample, guided_sample_reference
from genarm_fast.kernels.philox import TILE_LEVEL

TILE = 1024
VOCAB = 2 * TILE + 60  # the last tile is ragged
DRAWS = 20_000
WEIGHTS, TEMPERATURE = [0.8], 0.9
REJECT, ACCEPT = 1e-9, 1e-4  # p-values: a wrong sampler must be below the first, a right one above the second


@pytest.fixture(scope="module")
def members():
    generator = torch.Generator().manual_seed(7)
    base, arm = 2 * torch.randn(2, 1, VOCAB, generator=generator)
    base[0, [0, 3, 2 * TILE + 5]] += torch.tensor([10.0, 7.0, 7.0])  # heavy tokens, one of them in the ragged tile
    return base, arm


@pytest.fixture(scope="module")
def target(members):
    base, arm = (logits[0].double() for logits in members)
    return ((base + WEIGHTS[0] * arm) / TEMPERATURE).softmax(-1)


def draw(members, *, sample=guided_sample, draws=DRAWS, weights=WEIGHTS, seeds=1, positions=None, **options):
    """Return token ids [draws], drawn with one seed at many positions."""
    positions = torch.arange(draws) if positions is None else positions
    tokens = []
    for i in range(0, draws, 2000):
        base, *arms = (logits.expand(min(2000, draws - i), -1) for logits in members)
        chosen = {
            "positions": positions[i : i + 2000],
            "seeds": seeds if isinstance(seeds, int) else seeds[i : i + 2000],
        }
        tokens.append(sample(base, arms, weights, **({"temperature": TEMPERATURE} | chosen | options)).tokens)
    return torch.cat(tokens)


def chi_square(tokens, probs, bins=60):
    """Return the p-value of draws given probabilities, over bins of about equal mass and similar probability."""
    order = probs.argsort(descending=True)
    label = torch.empty_like(order)
    label[order] = ((probs[order].cumsum(0) - probs[order] / 2) * bins).long().clamp(0, bins - 1)
    expected = torch.zeros(bins, dtype=torch.double).index_add_(0, label, probs) * len(tokens)
    if (probs[tokens] == 0).any():
        return 0.0  # an impossible token
    observed = torch.bincount(label[tokens], minlength=bins)
    used = expected > 0
    statistic = ((observed - expected)[used] ** 2 / expected[used]).sum()
    return torch.special.gammaincc((used.sum().double() - 1) / 2, statistic / 2).item()


def pair_chi_square(first, second, probs):
    """Return the p-value of pairs of draws, given that the two are independent, over 8 x 8 bins."""
    label = ((probs.cumsum(0) - probs / 2) * 8).long().clamp(0, 7)
    mass = torch.zeros(8, dtype=torch.double).index_add_(0, label, probs)
    joint = label[first] * 8 + label[second]
    return chi_square(joint, (mass[:, None] * mass).flatten(), bins=64)


@pytest.mark.parametrize("sample", [guided_sample_reference, guided_sample], ids=["reference", "dispatcher"])
def test_draws_follow_the_target(members, target, sample):
    draws = 5000 if sample is guided_sample_reference else DRAWS
    assert chi_square(draw(members, sample=sample, draws=draws), target) > ACCEPT


def test_seeds_follow_the_target(members, target):
    """Draws at position 0 with many seeds, as for first tokens, follow the target too."""
    seeds = torch.arange(DRAWS)
    assert chi_square(draw(members, seeds=seeds, positions=torch.zeros_like(seeds)), target) > ACCEPT


@pytest.mark.parametrize(
    "mistake",
    [
        {"temperature": TEMPERATURE * 1.05},
        {"weights": [0.0]},
        {"vocab_size": 2 * TILE},  # draws never come from the ragged tile
    ],
    ids=lambda mistake: next(iter(mistake)),
)
def test_mistakes_are_rejected(members, target, mistake):
    assert chi_square(draw(members, **mistake), target) < REJECT


def test_one_noise_for_both_levels_is_rejected(members, target, monkeypatch):
    module = importlib.import_module("genarm_fast.kernels.guided_sample.reference")
    monkeypatch.setattr(module, "TOKEN_LEVEL", TILE_LEVEL)
    assert chi_square(draw(members, sample=guided_sample_reference, draws=5000), target) < REJECT


def test_tail_mass(members):
    """A dominant token leaves 2 % to all others, so that each of them is only drawn in the far tail of the noise."""
    base = members[0].clone()
    base[0, 100] = base[0].logsumexp(0) + math.log(49)
    probs = base[0].double().softmax(-1)
    probs[100] = 0
    expected, draws = probs.sum().item(), 4 * DRAWS
    rare = draw((base,), weights=[], temperature=1.0, draws=draws)
    rare = rare[rare != 100]
    assert abs(len(rare) - draws * expected) < 4 * math.sqrt(draws * expected)
    assert chi_square(rare, probs / expected, bins=20) > ACCEPT


def test_positions_are_independent(members, target):
    positions = torch.arange(DRAWS)
    now = draw(members, positions=positions)
    assert pair_chi_square(now, draw(members, positions=positions + 1), target) > ACCEPT
    assert pair_chi_square(now, draw(members, positions=positions, seeds=2), target) > ACCEPT
    assert pair_chi_square(now, draw(members, positions=positions), target) < REJECT  # control: the same noise twice


FILTERS = {"top_k": 300, "top_p": 0.8, "min_p": 0.002}


def truncated(probs, top_k, top_p, min_p):
    """Return the probabilities after top-k, top-p and min-p, computed by sorting."""
    ordered, order = probs.sort(descending=True)
    ordered[top_k:] = 0
    ordered /= ordered.sum()
    ordered[ordered.cumsum(0) - ordered >= top_p] = 0
    ordered[ordered < min_p * ordered[0]] = 0
    return torch.zeros_like(probs).index_copy_(0, order, ordered / ordered.sum())


def test_truncated_draws_follow_the_target(members, target):
    expected = truncated(target, **FILTERS)
    assert 10 < (expected > 0).sum() < FILTERS["top_k"]
    assert chi_square(draw(members, **FILTERS), expected) > ACCEPT


def test_truncating_the_base_alone_is_rejected(members, target):
    base, arm = members
    kept = truncated((base[0].double() / TEMPERATURE).softmax(-1), **FILTERS)[None] > 0
    assert chi_square(draw((base.masked_fill(~kept, -math.inf), arm)), truncated(target, **FILTERS)) < REJECT


def agreement(p, q):
    """Return the probability that Gumbel-coupled draws from p and q agree: in the tile, then in the token within it."""

    def coupled(x, y):
        """Return P(both argmaxes are i) = 1 / Σ_j max(x_j / x_i, y_j / y_i) for each i."""
        largest = torch.maximum(x[None] / x[:, None], y[None] / y[:, None])
        return torch.where((x > 0) & (y > 0), 1 / largest.sum(-1), 0.0)

    tiles = [(a, b) for a, b in zip(p.split(TILE), q.split(TILE), strict=True)]
    masses = [torch.stack([tile.sum() for tile in side]) for side in zip(*tiles, strict=True)]
    inside = [coupled(a / a.sum(), b / b.sum()).sum() if min(a.sum(), b.sum()) > 0 else 0.0 for a, b in tiles]
    return (coupled(*masses) * torch.tensor(inside, dtype=torch.double)).sum().item()


def holes(logits):
    generator = torch.Generator().manual_seed(3)
    return logits.masked_fill(torch.rand(logits.shape, generator=generator) < 0.5, -math.inf)


@pytest.mark.parametrize(
    "drafter",
    [
        pytest.param(lambda base, arm: base, id="base"),
        pytest.param(lambda base, arm: 1.8 * arm, id="tempered-arm"),
        pytest.param(lambda base, arm: (base + 0.8 * arm).flip(-1), id="reversed"),
        pytest.param(lambda base, arm: holes(base + 0.8 * arm), id="holes"),
        pytest.param(lambda base, arm: base + 0.8 * arm, id="equal"),
    ],
)
@pytest.mark.parametrize("filters", [None, {"top_k": 50, "top_p": 0.9, "min_p": 0.0}], ids=["all", "filtered"])
def test_coupled_agreement_is_the_closed_form(members, drafter, filters):
    """A drafter with the target's noise agrees with it as often as theory says. Speculation's speed depends on that."""
    draws = 6000
    base, arm = members
    draft, combined = drafter(base, arm), base + WEIGHTS[0] * arm
    p, q = (logits[0].double().softmax(-1) for logits in (combined, draft))
    if filters:
        p, q = truncated(p, **filters), truncated(q, **filters)
    options = {"temperature": 1.0, "draws": draws, **(filters or {})}
    drafted = draw((draft,), weights=[], **options)
    agreed = (drafted == draw(members, **options)).double().mean().item()
    expected = agreement(p, q)
    assert abs(agreed - expected) < 4 * math.sqrt(max(expected * (1 - expected), 1e-4) / draws)
