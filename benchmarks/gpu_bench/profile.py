"""Profiles the device's work for a token, kernels and launches, by torch.profiler, and by nsys where it exists."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from .measure import Bench
from .schedule import Skip

SHOWN = 20
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
COPIES = ("cudaMemcpyAsync", "cudaMemsetAsync")


def profile(bench: Bench) -> dict[str, Any]:
    """Profile plain decoding of one request with a LoRA ARM, after its shapes are captured."""
    model = bench.lanes("8b", 1)
    skip, tokens = (4, 2) if bench.setting.name == "dry" else (24, 16)
    return by_torch(bench, model, skip, tokens)


def profile_by_nsys(bench: Bench) -> dict[str, Any]:
    """Profile the same decoding by nsys, which shows each kernel of a graph.

    The row is the last one, since it takes as long as three others: nsys needs a process that makes the model again.
    """
    if bench.setting.name == "dry" or not shutil.which("nsys"):
        raise Skip("nsys is not installed, or has no GPU to look at")
    return by_nsys(16)


def by_torch(bench: Bench, model: Any, skip: int, tokens: int) -> dict[str, Any]:
    activities = [ProfilerActivity.CPU]
    if bench.setting.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    decode(bench, model, skip, tokens, profiler.start, profiler.stop)
    on_device = bench.setting.device.type == "cuda"
    kernels, calls = [], {}
    for event in profiler.key_averages():
        time = event.self_device_time_total if on_device else event.self_cpu_time_total
        if event.key in (*LAUNCHES, *COPIES):
            calls[event.key] = event.count / tokens
        elif str(event.device_type).endswith("CUDA") if on_device else time > 0:
            kernels.append({"name": event.key[:120], "launches": event.count / tokens, "us": time / tokens})
    return summary(kernels) | {"tool": "torch.profiler", "tokens": tokens, "host_calls": calls}


def summary(kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the launches per token, the µs per token of all kernels, and the kernels that take the most time."""
    kernels = sorted(kernels, key=lambda kernel: -kernel["us"])
    total = {name: sum(kernel[name] for kernel in kernels) for name in ("launches", "us")}
    return {"launches_per_token": total["launches"], "device_us_per_token": total["us"], "kernels": kernels[:SHOWN]}


def decode(bench: Bench, model: Any, skip: int, tokens: int, start: Any, stop: Any) -> None:
    """Decode a text; call `start` after `skip` tokens and `stop` after `tokens` more."""
    (prompt,) = bench.prompts(1, bench.setting.context, model.vocab_size)
    last = skip + tokens
    with model.stream(prompt, max_new_tokens=last + 4, ignore_eos=True, seed=1, speculation="off") as stream:
        for i, _ in enumerate(stream, 1):
            if i in (skip, last):
                torch.cuda.synchronize()
                (start if i == skip else stop)()


def by_nsys(tokens: int) -> dict[str, Any]:
    """Profile `tokens` tokens in a process that nsys starts."""
    script = Path(__file__).parents[1] / "gpu.py"
    with tempfile.TemporaryDirectory() as folder:
        report = str(Path(folder, "report"))
        command = ["nsys", "profile", "--trace=cuda,nvtx", "--cuda-graph-trace=node", "--sample=none"]
        command += ["--capture-range=cudaProfilerApi", "--capture-range-end=stop", "-o", report]
        command += [sys.executable, str(script), "--profiled"]
        subprocess.run(command, check=True, capture_output=True, timeout=90)
        stats = ["nsys", "stats", "--report", "cuda_gpu_kern_sum", "--format", "csv", f"{report}.nsys-rep"]
        text = subprocess.run(stats, check=True, capture_output=True, text=True, timeout=60).stdout
    return summary(kernels_of(text, tokens)) | {"tool": "nsys", "tokens": tokens}


def kernels_of(text: str, tokens: int) -> list[dict[str, Any]]:
    """Return the kernels in the CSV table that `nsys stats` prints below some other lines."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("Time (%)")), None)
    if first is None:
        raise ValueError(f"no table in what nsys printed: {text[:200]!r}")
    rows: Sequence[dict[str, str]] = list(csv.DictReader(io.StringIO("\n".join(lines[first:]))))
    return [
        {
            "name": row["Name"][:120],
            "launches": int(row["Instances"]) / tokens,
            "us": float(row["Total Time (ns)"]) / 1e3 / tokens,
        }
        for row in rows
    ]


def profiled(bench: Bench) -> None:
    """Decode the text that `by_nsys` profiles, in the process that nsys starts."""
    decode(bench, bench.lanes("8b", 1), 24, 16, torch.cuda.profiler.start, torch.cuda.profiler.stop)
