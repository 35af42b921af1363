"""The reference against hand-worked numbers and brute-force enumeration; each law test has a negative control."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from genarm_fast.reference import draw, generate, guided_probs, guided_scores

BASE = torch.log(torch.tensor([0.5, 0.3, 0.2]))
ARM = torch.log(torch.tensor([0.1, 0.3, 0.6]))
NEG_INF = -math.inf


def probs(*args, **kwargs) -> list[float]:
    return guided_probs(*args, **kwargs).tolist()


def normalised(*numbers: float) -> list[float]:
    return [number / sum(numbers) for number in numbers]


@pytest.mark.parametrize(
    ("weights", "temperature", "expected"),
    [
        ([0.0], 1.0, [0.5, 0.3, 0.2]),
        ([1.0], 1.0, normalised(0.05, 0.09, 0.12)),
        ([-1.0], 1.0, normalised(5.0, 1.0, 1 / 3)),
        ([1.0], 0.5, normalised(0.05**2, 0.09**2, 0.12**2)),  # T divides the whole sum
        ([0.5], 2.0, normalised((0.5 * 0.1**0.5) ** 0.5, (0.3 * 0.3**0.5) ** 0.5, (0.2 * 0.6**0.5) ** 0.5)),
        ([1.0], 0.0, [0.0, 0.0, 1.0]),
    ],
)
def test_hand_worked(weights, temperature, expected):
    assert probs(BASE, [ARM], weights, temperature=temperature) == pytest.approx(expected, abs=1e-7)


def test_normalisers_cancel_and_arms_add():
    shifted = guided_probs(BASE + 7.0, [ARM - 3.0, BASE], [0.8, -0.2])
    assert torch.allclose(shifted, guided_probs(BASE, [ARM, BASE], [0.8, -0.2]))
    assert torch.allclose(guided_probs(BASE, [ARM, ARM], [0.3, 0.5]), guided_probs(BASE, [ARM], [0.8]))


def test_greedy_tie_goes_to_the_lowest_id():
    assert probs(torch.tensor([1.0, 3.0, 3.0]), [], [], temperature=0) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"top_k": 1}, [1.0, 0, 0, 0]),
        ({"top_k": 2}, normalised(0.4, 0.3, 0, 0)),
        ({"top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.39}, [1.0, 0, 0, 0]),
        ({"top_p": 0.41}, normalised(0.4, 0.3, 0, 0)),
        ({"top_p": 1e-9}, [1.0, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, normalised(0.4, 0.3, 0, 0)),  # 0.4/0.9 < 0.5: top-p sees what top-k left
        ({"min_p": 0.49}, normalised(0.4, 0.3, 0.2, 0)),
        ({"min_p": 1.0}, [1.0, 0, 0, 0]),
    ],
)
def test_filters(filters, expected):
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert probs(logits, [], [], **filters) == pytest.approx(expected, abs=1e-7)


def test_filters_act_on_the_combination_after_temperature():
    combined = probs(BASE, [ARM], [1.0], top_k=1)
    assert combined == [0.0, 0.0, 1.0]  # filtering the base first would leave only token 0
    sharp = probs(BASE, [], [], temperature=0.25, top_p=0.8)
    assert sharp == [1.0, 0.0, 0.0]  # before temperature, 0.5 < 0.8 would keep two tokens


def test_ties_at_a_threshold_are_kept():
    assert probs(torch.zeros(4), [], [], top_k=2) == pytest.approx([0.25] * 4)
    assert probs(torch.zeros(4), [], [], top_p=0.3) == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_a_masked_token_stays_masked_whatever_the_sign(weight):
    arm = torch.tensor([0.0, NEG_INF, 0.0])
    assert probs(BASE, [arm], [weight])[1] == 0.0
    assert probs(BASE, [arm], [0.0])[1] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("base", "arms", "weights", "message"),
    [
        (BASE, [ARM], [1.0, 2.0], r"weights=\[1.0, 2.0\]: expected one per ARM, 1 in all, got 2"),
        (BASE, [ARM[:2]], [1.0], r"arm_logits\[0\] of shape \(2,\): expected \(3,\)"),
        (BASE, [ARM * math.nan], [1.0], r"arm_logits\[0\]: expected finite"),
        (BASE + math.inf, [], [], "base_logits: expected finite"),
        (torch.tensor([0.0, NEG_INF]), [torch.tensor([NEG_INF, 0.0])], [1.0], "at least one token"),
    ],
)
def test_bad_input_is_refused(base, arms, weights, message):
    with pytest.raises(ValueError, match=message):
        guided_probs(base, arms, weights)


def test_scores_are_normalised_in_float64():
    scores = guided_scores(torch.randn(5, 300), [torch.randn(5, 300)], [1.5])
    assert scores.dtype == torch.float64
    assert torch.allclose(scores.logsumexp(-1), torch.zeros(5, dtype=torch.float64), atol=1e-12)


class Table:
    """A bigram model: the logits after a token are a row of a table."""

    def __init__(self, seed: int, vocab: int = 3):
        self.rows = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def __call__(self, input_ids):
        return SimpleNamespace(logits=self.rows[input_ids])


def law(base: Table, arm: Table, weight: float, temperature: float, length: int) -> dict[tuple[int, ...], float]:
    """Return the probability of every sequence after prompt token 0, multiplied out in plain Python."""
    result = {}
    for sequence in itertools.product(range(len(base.rows)), repeat=length):
        probability, previous = 1.0, 0
        for token in sequence:
            mass = [
                math.exp((b + weight * a) / temperature)
                for b, a in zip(base.rows[previous].tolist(), arm.rows[previous].tolist())
            ]
            probability *= mass[token] / sum(mass)
            previous = token
        result[sequence] = probability
    return result


def chi_square(counts: dict, expected: dict, draws: int) -> float:
    return sum((counts.get(key, 0) - draws * p) ** 2 / (draws * p) for key, p in expected.items())


def test_generate_follows_the_enumerated_law():
    base, arm, draws = Table(0), Table(1), 4000
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(draws):
        tokens = generate(base, [arm], [[0], [0]], [0.7], temperature=1.3, max_new_tokens=2, seed=seed).tokens
        counts[tuple(tokens)] = counts.get(tuple(tokens), 0) + 1
    bound = 26.1  # chi-square, 8 degrees of freedom, p = 0.001
    assert chi_square(counts, law(base, arm, 0.7, 1.3, 2), draws) < bound
    assert chi_square(counts, law(base, arm, 0.7, 1.0, 2), draws) > bound  # wrong temperature
    assert chi_square(counts, law(base, arm, 0.0, 1.3, 2), draws) > bound  # dropped ARM


def test_noise_is_fresh_at_every_position_and_seed():
    flat = torch.full((64,), 1 / 64, dtype=torch.float64)
    by_position = [draw(flat, 5, position) for position in range(200)]
    by_seed = [draw(flat, seed, 5) for seed in range(200)]
    assert len(set(by_position)) > 45  # 200 draws of 64: 61 distinct expected
    assert len(set(by_seed)) > 45
    assert sum(a == b for a, b in zip(by_position, by_seed)) < 20
    assert [draw(flat, 5, position) for position in range(200)] == by_position


def test_prompts_weights_and_stops_per_member():
    base, arm = Table(2), Table(3)
    run = {"temperature": 0.0, "max_new_tokens": 4}
    changing = generate(base, [arm], [[0], [1, 2]], lambda t: [0.0 if t < 2 else 5.0], **run)
    token, tokens = 0, []
    arm_token = 2
    for t in range(4):
        token = int((base.rows[token] + (0.0 if t < 2 else 5.0) * arm.rows[arm_token]).argmax())
        arm_token = token
        tokens.append(token)
    assert changing.tokens == tokens
    stopped = generate(base, [arm], [[0], [1, 2]], lambda t: [0.0], stop_token_ids=[tokens[0]], **run)
    assert stopped.tokens == tokens[:1]
    held = generate(base, [arm], [[0], [1, 2]], [0.0], stop_token_ids=[tokens[0]], min_new_tokens=2, **run)
    assert held.tokens[0] != tokens[0]
    assert len(held.tokens) >= 3 or held.tokens[-1] != tokens[0]


def test_penalty_bias_and_hooks_act_on_the_combination():
    base = Table(4)
    run = {"temperature": 0.0, "max_new_tokens": 1}
    first, second = base.rows[0].sort(descending=True).indices[:2].tolist()
    assert generate(base, [], [[0]], [], **run).tokens == [first]
    assert generate(base, [], [[first, 0]], [], repetition_penalty=50.0, **run).tokens != [first]
    assert generate(base, [], [[0]], [], logit_bias={first: NEG_INF}, **run).tokens == [second]
    seen = []

    def hook(input_ids, scores):
        seen.append((input_ids.tolist(), float(scores.exp().sum())))
        return scores.index_fill(-1, torch.tensor([first]), NEG_INF)

    assert generate(base, [], [[0]], [], logits_processors=[hook], **run).tokens == [second]
    assert seen == [([[0]], pytest.approx(1.0, abs=1e-5))]
