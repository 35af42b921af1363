"""The tables of docs/results.md equal what the code makes of the result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

ESTIMATE = {"value": 0.5, "low": 0.4, "high": 0.6}
MACHINE = {"date": "2026-11-28", "device": "CPU", "cores": 2, "capability": "AVX2", "threads": 1, "load": 3.5}


@pytest.fixture
def evidence(script):
    return script("evidence")


def test_the_page_has_the_figures_of_the_result_files(evidence) -> None:
    page = evidence.PAGE.read_text(encoding="utf-8")
    blocks = evidence.blocks()
    assert evidence.fill(page, blocks) == page
    rows = blocks["general"].splitlines()
    assert sum(row in page for row in rows) == len(rows)
    assert evidence.fill(page, blocks | {"general": "another"}) != page


def test_where_and_when(evidence) -> None:
    assert evidence.about({"machine": MACHINE}) == (
        "2026-11-28, 2 cores of an CPU, AVX2, one thread, while other work ran beside (load 3.5)."
    )
    found = {"machine": MACHINE, "size": {"tokens": 32, "seeds": 1}, "prompts": 12}
    found |= {"judge_accuracy": {"imdb": 0.9, "other": 0.75}, "policies_by_dpo": []}
    assert evidence.judged(found).startswith(
        "12 prompts, up to 32 tokens, 1 seed(s). The judge's accuracy on held-out reviews: imdb 0.900, other 0.750. "
        "ARMs stand in for policies. 2026"
    )
    assert "Policies by DPO: positive." in evidence.judged(found | {"policies_by_dpo": ["positive"]})


def test_a_trace_is_told_by_its_weights(evidence) -> None:
    steps = [("A", [1.0, 0.0, 0.0]), (" b", [1.0, 0.0, 0.0]), ("\nc", [0.0, 1.0, 0.0]), ("", None)]
    trace = [{"text": text, "weights": [weights] if weights else []} for text, weights in steps]
    assert evidence.told(trace).splitlines() == [
        "* (positive, concise) = (1, 0): “A b”",
        "* (positive, concise) = (0, 1): “c”",
    ]


def test_a_curve_over_sizes_takes_more_than_the_arm_that_ships(evidence) -> None:
    assert not evidence.has_sizes(None)
    assert not evidence.has_sizes({"methods": {}})
    assert not evidence.has_sizes({"small_arms": {"small ARM, w = 1": {}}})
    assert evidence.has_sizes({"small_arms": {"small ARM, w = 1": {}, "small-3.5M ARM, w = 1": {}}})


def test_every_method_of_a_front_has_a_colour(evidence, script) -> None:
    methods = script("quality_methods")
    names = methods.fronts(methods.Models({}, None), 2)
    assert {name.rsplit(" ", 1)[0] for name in names} == set(evidence.COLOURS)


def test_plot_of_a_front(evidence, tmp_path: Path) -> None:
    row = {"points": [[0.1, 0.9], [0.5, 0.5]], "hypervolume": ESTIMATE, "mean_inner_product": ESTIMATE}
    found = {"methods": dict.fromkeys(evidence.COLOURS, row)}
    evidence.plot_front(found, tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000
    single = {evidence.TRAINED: {"positive": ESTIMATE, "short": ESTIMATE}}
    evidence.plot_front(found | {"single_points": {"0.50": single}}, tmp_path / "more.png")
    assert (tmp_path / "more.png").read_bytes() != (tmp_path / "front.png").read_bytes()


def test_published_ratios_stand_beside_ours(script) -> None:
    cost = script("cost")

    def row(ratio: float) -> dict:
        return {"to_base": {"median": ratio}}

    names = {"base": 1.0, "guided, w = 1": 1.5, "published stack, w = 1": 2.25, "Transfer-Q, w = 10": 30.0}
    costs = {"batches": {"1": {name: row(ratio) for name, ratio in names.items()}}}
    costs |= {"published_to_base": cost.PUBLISHED, "published_to_guided": cost.PUBLISHED_TO_GUIDED}
    table = cost.published(json.loads(json.dumps(costs)))
    assert "| guided (H100, PALC's paper), to its base | 3.17 | 1.5, and by the published stack 2.2 |" in table
    assert "| Transfer-Q (GenARM's paper), to its guided decoding | 17.93 | 20.0 |" in table
    assert "| ARGS (H100, PALC's paper), to its base | 4.40 | - |" in table
    assert "| CARDS (GenARM's paper), to its guided decoding | 11.96 | - |" in table
