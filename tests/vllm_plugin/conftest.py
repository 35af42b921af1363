"""Tests inside vLLM. They run in `.venv-vllm` (make test-vllm), and are not collected where vLLM is not installed."""

from __future__ import annotations

import os
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
if find_spec("vllm") is None or not getattr(find_spec("vllm"), "origin", None):
    collect_ignore_glob = ["test_*.py"]

# In this process and in all that vLLM starts.
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "site"), str(HERE.parent), str(HERE)])
# Engines start without processes of their own, each of which imports vLLM and torch anew: 10 s of CPU.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
runpy.run_path(str(HERE / "site" / "sitecustomize.py"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models, see engines.py."""
    from engines import save_models

    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder
