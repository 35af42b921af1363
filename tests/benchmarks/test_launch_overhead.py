"""Repeated calls use Triton's own launcher, compiled for CUDA, by addresses, with two launches or four."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, for the driver that launches nothing")
def test_launches_of_known_calls():
    """The test has its own process, since Triton keeps its driver. An unknown call would make a new plan."""
    code = """
import json, launch_overhead as benchmark
from unittest.mock import patch
with benchmark.launching_nothing() as cuda:
    from genarm_fast.kernels.guided_sample import triton
    plans, make = [], triton.Plan
    with patch.object(triton, "Plan", lambda *call: plans.append(call) or make(*call)):
        found = {name: benchmark.measure(call, cuda.launched, 3, 2) for name, call in benchmark.cases().items()}
print(json.dumps([{name: line["launches"] for name, line in found.items()}, len(plans)]))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    launches, plans = json.loads(run.stdout.splitlines()[-1])
    assert launches == {"tensors": 2, "log-probs": 2, "filters": 4, "numbers": 2, "as in a loop": 2}
    assert plans == len(launches)
