"""The description of the machine that all result files have, and the writing of their tables into pages."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers


def processor() -> str:
    """Return the processor's name from /proc/cpuinfo, or what Python knows of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return the hardware, versions and date, and `load`: the mean number of busy processes over the last minute."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load": round(os.getloadavg()[0], 1),
    }


def peak_resident() -> int:
    """Return the largest resident set of this process so far, in bytes (Linux).

    `ru_maxrss` would not do: a child starts with its parent's value, so the children of a large parent look alike.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def name_of(about: Mapping[str, Any]) -> str:
    """Return the device's name in a form for file names: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", str(about["device"]).lower()).strip("-")


def fill(page: str, blocks: Mapping[str, str]) -> str:
    """Return the page with the text between `<!-- begin X -->` and `<!-- end X -->` replaced by blocks[X].

    Raises:
        ValueError: the page lacks the marks of a block.
    """
    for name, text in blocks.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        before, found, rest = page.partition(begin)
        _, ended, after = rest.partition(end)
        if not found or not ended:
            raise ValueError(f"expected {begin.strip()} and {end} around the text of a page, in this order")
        page = f"{before}{begin}{text.strip()}\n{end}{after}"
    return page
