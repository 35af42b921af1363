"""Figures of fronts, worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

VALUES = {0.0: (0.0, 1), 0.5: (0.5, 2), 1.0: (1.0, 4)}  # share: P(positive), number of tokens (at most 5)


@pytest.fixture
def front(script, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(script("quality_measures"), "RESAMPLES", 200)
    return script("front_measures")


@pytest.fixture
def size(script):
    from dataclasses import replace

    return replace(script("quality_methods").SIZES["quick"], prompts=3, tokens=5, seeds=2, points=3)


def texts(positive: float, tokens: float) -> SimpleNamespace:
    """Return texts of three prompts and two seeds with these means over prompts."""
    around = np.array([[-0.1, 0.1], [0.1, 0.1], [-0.1, -0.1]])
    return SimpleNamespace(scores=lambda judge: positive + around, tokens=tokens + around)


def test_front(front, script, size) -> None:
    """Three points follow their shares; hypervolume and inner product are worked out by hand."""
    name = script("quality_methods").point_name
    found = {name("guided", share): texts(*values) for share, values in VALUES.items()}
    figures = front.front_figures(found, None, size)["guided"]
    np.testing.assert_allclose(figures["points"], [[0.0, 0.8], [0.5, 0.6], [1.0, 0.2]])
    assert figures["hypervolume"]["value"] == pytest.approx(0.5 * 0.6 + 0.5 * 0.2)
    assert figures["mean_inner_product"]["value"] == pytest.approx((0.8 + 0.55 + 1.0) / 3)
    assert "guided" in script("quality").table({"scenario": "front", "methods": {"guided": figures}})


def test_policies_of_single_points(front, script, size) -> None:
    """Such policies have no front; at their shares they are listed beside every method."""
    name, trained = script("quality_methods").point_name, script("quality_methods").TRAINED
    found = {name("guided", share): texts(*values) for share, values in VALUES.items()}
    found[name(trained, 0.5)] = texts(0.75, 1)
    assert list(front.front_figures(found, None, size)) == ["guided"]
    points = front.single_points(found, None, size, [0.5])
    assert list(points) == ["0.50"]
    figures = {method: [each["value"] for each in row.values()] for method, row in points["0.50"].items()}
    assert figures[trained] == pytest.approx([0.75, 0.8, 0.775])
    assert figures["guided"] == pytest.approx([0.5, 0.6, 0.55])
    spread = points["0.50"]["guided"]["positive"]
    assert spread["low"] < 0.5 < spread["high"]
    unequal = front.single_points(found | {name(trained, 0.0): texts(0.75, 1)}, None, size, [0.0])["0.00"][trained]
    assert unequal["inner_product"]["value"] == pytest.approx(0.8), "the share is of the first objective"
    table = front.points_table(points).splitlines()
    assert len(table) == 4
    assert table[2].startswith("| 0.50 | trained for the point | 0.75 [")
    assert front.points_table({}).count("\n") == 1
