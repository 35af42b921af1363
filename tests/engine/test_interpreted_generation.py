"""Runs whole generations in Triton's interpreter."""

import pytest

pytest.importorskip("triton")
from in_interpreter import NEEDS_NUMPY, run_interpreted


@NEEDS_NUMPY
@pytest.mark.parametrize(
    "name",
    [
        "test_lanes",
        "test_lanes_with_drafts_of_the_text",
        "test_two_models_with_drafts",
        "test_a_draft_model",
        "test_lanes_with_a_draft_model",
        "test_weights_that_change",
    ],
)
def test_interpreted(name):
    run_interpreted(f"tests/engine/interpreted_generation.py::{name}")
