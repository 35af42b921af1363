"""Runs a test file in Triton's interpreter, in a process of its own: triton reads its mode when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import triton
from packaging.version import Version

ROOT = Path(__file__).parents[1]
NEEDS_NUMPY = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"),
    reason="the interpreter of triton 3.6 makes a number of a one-element array, which numpy 2.4 refuses",
)


def run_interpreted(tests: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
