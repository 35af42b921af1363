"""Runs the stacked decoder in Triton's interpreter."""

import pytest

pytest.importorskip("triton")
from in_interpreter import NEEDS_NUMPY, run_interpreted


@NEEDS_NUMPY
def test_interpreted():
    run_interpreted("tests/models/interpreted_stacked_decoder.py")
