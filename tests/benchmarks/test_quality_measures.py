"""Win rates, shares of a gap and fronts, on cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest


def test_win_rate(script) -> None:
    measures = script("quality_measures")
    ours, theirs = np.array([[1.0], [2.0], [3.0], [0.0]]), np.array([[0.0], [2.0], [4.0], [-1.0]])
    found = measures.win_rate(ours, theirs)
    assert found.value == 0.625  # two wins, a tie, a loss
    assert found.low < 0.625 < found.high
    assert measures.win_rate(theirs, ours).value == 0.375
    assert measures.win_rate(ours, ours).value == 0.5
    sure = measures.win_rate(ours + 10, theirs)
    assert (sure.low, sure.high) == (1.0, 1.0)


def test_intervals_cover(script) -> None:
    """About 95 % of the 95 % intervals of the mean of 40 normal numbers hold the truth; intervals half as wide do
    not."""
    measures, rng = script("quality_measures"), np.random.default_rng(1)
    measures.RESAMPLES = 400
    found = [measures.mean(rng.normal(size=40)) for _ in range(200)]
    assert 0.88 <= np.mean([each.low < 0 < each.high for each in found]) <= 0.99
    assert np.mean([each.low / 2 + each.value / 2 < 0 < each.high / 2 + each.value / 2 for each in found]) < 0.85


def test_share_of_a_gap(script) -> None:
    measures, rng = script("quality_measures"), np.random.default_rng(0)
    base = rng.normal(size=50)
    target = base + 1 + rng.normal(size=50) / 10
    share = measures.recovered(base, base + 0.6, target)
    assert share.value == pytest.approx(0.6, abs=0.03)
    assert share.low < share.value < share.high
    assert measures.recovered(base, base + 0.6, base + rng.normal(size=50)) is None  # there is no gap


def test_hypervolume(script) -> None:
    hypervolume = script("quality_measures").hypervolume
    assert hypervolume(np.array([[1.0, 1.0]])) == 1.0
    assert hypervolume(np.array([[0.5, 1.0], [1.0, 0.5]])) == 0.75
    assert hypervolume(np.array([[0.5, 1.0], [1.0, 0.5], [0.4, 0.4]])) == 0.75  # a dominated point adds nothing
    assert hypervolume(np.array([[1.0, 1.0], [1.0, 0.2]])) == 1.0
    assert hypervolume(np.array([[-1.0, 3.0]])) == 0.0
    assert hypervolume(np.array([[2.0, 2.0]]), (1.0, 1.0)) == 1.0


def test_mean_inner_product_tells_the_order_of_points(script) -> None:
    figure = script("quality_measures").mean_inner_product
    weights = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert figure(np.array([[0.9, 0.1], [0.2, 0.8]]), weights) == pytest.approx(0.85)
    assert figure(np.array([[0.2, 0.8], [0.9, 0.1]]), weights) == pytest.approx(0.15)


def test_signs_of_a_hacked_judge(script) -> None:
    measures = script("quality_measures")
    assert measures.repetition(["good good good good good"]).tolist() == [pytest.approx(2 / 3)]
    assert measures.repetition(["one two three four", "short"]).tolist() == [0.0, 0.0]
    assert measures.distinct(["a b c", "a b d"]) == 0.75
    assert measures.distinct([""]) == 0.0


def test_no_figure(script) -> None:
    with pytest.raises(ValueError, match="expected a finite number"):
        script("quality_measures").estimate(lambda chosen: float("nan"), 3)
