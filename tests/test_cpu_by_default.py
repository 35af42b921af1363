"""On a machine with a GPU, tests without the mark `gpu` run on the CPU, and tests with it find the GPU."""

import os
import subprocess
import sys
from pathlib import Path

PRETENCE = """
import torch
torch.cuda.is_available = torch.accelerator.is_available = lambda *_: True
"""
TESTS = """
import os
import pytest, torch
from genarm_fast.models.checkpoint import check_device

@pytest.fixture(scope="module")
def device():
    return check_device(None)

def test_without_a_mark(device):
    assert device == torch.device("cpu") == check_device(None)
    assert not torch.accelerator.is_available()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_with_the_mark():
    assert check_device(None) == torch.device("cuda")
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == "0"
"""


def test_tests_mean_the_cpu(tmp_path):
    (tmp_path / "pretence.py").write_text(PRETENCE)
    (tmp_path / "test_it.py").write_text(TESTS)
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tmp_path), str(root / "tests"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-o", "addopts=", "-p", "pretence", "-p", "conftest"]
    done = subprocess.run(
        [*command, "-c", str(root / "pyproject.toml"), "-p", "no:cacheprovider", str(tmp_path / "test_it.py")],
        cwd=root, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout, done.stdout
