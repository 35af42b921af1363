"""The expected gain of drafting, compared with the design's figures and simulated steps."""

from __future__ import annotations

import pytest
from simulated_steps import Draft, World

from genarm_fast.speculation.estimates import best_k, expected_speedup, expected_tokens
from genarm_fast.speculation.observations import PLAIN, Choice


@pytest.mark.parametrize(("cost", "acceptance", "k", "expected"), [(0.1, 0.8, 0, 1.0), (1.0, 0.0, 1, 1.0)])
def test_model_where_it_is_plain(cost: float, acceptance: float, k: int, expected: float) -> None:
    assert expected_speedup(cost, acceptance, k) == pytest.approx(expected)


def test_model_of_the_design() -> None:
    assert expected_tokens([0.5] * 3) == pytest.approx((1 - 0.5**4) / (1 - 0.5))
    assert expected_speedup(0.1, 0.8, 6) == pytest.approx(1.1 * 3.951424 / (0.1 * (6 + 0.8**6) + 1))
    assert best_k(0.1, 0.8, 16) == 6  # 2.7 in the design's table
    assert best_k(0.3, 0.0, 16) == 0


def test_model_is_what_simulated_steps_cost() -> None:
    world = World([Draft(0.8, cost=0.15, member=True)], slope=0.0)
    for k in range(6):
        choice = Choice(0, k) if k else PLAIN
        assert world.seconds_per_token(PLAIN, 1) / world.seconds_per_token(choice, 1) == pytest.approx(
            expected_speedup(0.15, 0.8, k)
        )
