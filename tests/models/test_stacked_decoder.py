"""The stacked decoder, over Triton's interpreter in a process of its own: triton reads its mode when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"),
    reason="the interpreter of triton 3.6 makes a number of a one-element array, which numpy 2.4 refuses",
)
def test_interpreted():
    tests = "tests/models/interpreted_stacked_decoder.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
