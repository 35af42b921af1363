"""The loss and the summary of held-out pairs, compared with hand computation."""

from __future__ import annotations

import math

import pytest
import torch

from genarm_fast.train.metrics import PairStats, pair_losses


def test_loss_by_hand() -> None:
    """The loss is −log σ(0.5 · (−3 + 5)) = log(1 + e^−1), and log 2 for equal sums."""
    losses = pair_losses(torch.tensor([-3.0, -4.0, -5.0, -4.0]), 0.5)
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(2)])
    losses = pair_losses(torch.tensor([-3.0, -4.0, -5.0, -4.0]), 0.5, torch.tensor([1.0, -1.0]))
    assert losses.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-1))])


def test_loss_does_not_overflow() -> None:
    assert pair_losses(torch.tensor([-1e4, 0.0, 0.0, -1e4]), 1.0).tolist() == [1e4, 0.0]


def test_summary() -> None:
    stats = PairStats(beta=0.5)
    # Margins 2, -1; lengths -2, +2; then a tie.
    stats.add(torch.tensor([-1.0, -5.0, -3.0, -4.0]), torch.tensor([2, 6, 4, 4]), torch.zeros(2))
    stats.add(torch.tensor([-2.0, -2.0]), torch.tensor([3, 3]), torch.tensor([0.25]))
    found = stats.summary()
    assert found["pairs"] == 3
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(0.25 / 3))
    assert found["margin_mean"] == pytest.approx(1 / 3)
    assert found["margin_std"] == pytest.approx(math.sqrt((4 + 1) / 3 - 1 / 9))
    assert found["reward_chosen"] == pytest.approx(-8 / 3)
    assert found["reward_rejected"] == pytest.approx(-9 / 3)
    assert (found["tokens_chosen"], found["tokens_rejected"]) == (pytest.approx(11 / 3), pytest.approx(11 / 3))
    assert found["length_baseline_accuracy"] == pytest.approx(0.5)
    assert (found["accuracy_chosen_shorter"], found["accuracy_chosen_longer"]) == (1.0, 0.0)
    losses = [
        -math.log(1 / (1 + math.exp(required - 0.5 * margin))) for margin, required in ((2, 0), (-1, 0), (0, 0.25))
    ]
    assert found["loss"] == pytest.approx(sum(losses) / 3)
    assert PairStats.of_rows(0.5, stats.rows()) == stats


def test_length_bias_shows() -> None:
    """A reward of −1 per token depends on length alone; a reward that ignores length has no correlation with it."""
    tokens = torch.tensor([1, 5, 3, 9, 4, 2, 6, 8])
    biased, fair = PairStats(1.0), PairStats(1.0)
    biased.add(-tokens.float(), tokens, torch.zeros(4))
    fair.add(torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]), tokens, torch.zeros(4))
    assert biased.summary()["length_margin_correlation"] == pytest.approx(-1.0)
    assert biased.summary()["accuracy"] == biased.summary()["length_baseline_accuracy"]
    assert fair.summary()["length_margin_correlation"] == 0.0


def test_nothing_held_out() -> None:
    assert PairStats(1.0).summary() == {}
