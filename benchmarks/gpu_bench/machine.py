"""Describe the machine and the software that the numbers were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
QUERIED = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")


def machine(device: torch.device) -> dict[str, Any]:
    """Return names, versions, clocks, date and commit. Raises RuntimeError if CUDA does not work."""
    if device.type == "cuda":
        torch.cuda.init()
    found: dict[str, Any] = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **commit()}
    found |= {name: _version(name) for name in ("torch", "triton", "transformers", "peft", "numpy")}
    found |= {"python": platform.python_version(), "cpu": _cpu(), "cores": os.cpu_count(), "command": sys.argv}
    if device.type != "cuda":
        return found | {"gpu": "none: a trial on the CPU, with stand-ins for what a GPU does"}
    properties = torch.cuda.get_device_properties(device)
    found |= {"gpu": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    found |= {"multiprocessors": properties.multi_processor_count}
    return found | {"nvidia_smi": clocks()}


def clocks() -> dict[str, str]:
    """Return the QUERIED values of nvidia-smi by name, {} without the tool."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader"]
    return dict(zip(QUERIED, (each.strip() for each in _output(command).split("\n")[0].split(","))))


def commit() -> dict[str, Any]:
    """Return the commit of the working tree, and the number of tracked files with changes."""
    found = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip()
    changes = _output(["git", "-C", str(ROOT), "status", "--porcelain", "-uno"]).strip()
    return {"commit": found or None, "changed_files": len(changes.splitlines())}


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
