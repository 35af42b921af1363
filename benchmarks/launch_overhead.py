"""Measures the host time of a guided_sample call for a GPU, but without one: a driver on CPU tensors launches nothing.

    python benchmarks/launch_overhead.py [--rounds 7] [--calls 500] [--json]

All Python code runs as on CUDA. Triton's own C launcher runs too, linked with a libcuda of empty functions, which a C
compiler makes here. The time of the real libcuda functions and of PyTorch's caching allocator is not included. The
clock is CPU time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton

FUNCTIONS = """
#include <stdint.h>
static long launches;
long launched(void) { return launches; }
int cuLaunchKernelEx(void *c, void *f, void **a, void **e) { return ++launches, 0; }
int cuPointerGetAttribute(uint64_t *out, int what, uint64_t pointer) { return *out = pointer, 0; }
int cuCtxGetCurrent(void **out) { return *out = (void *)1, 0; }
int cuDeviceGetAttribute(int *out, int what, int device) { return *out = 232448, 0; }
int cuFuncGetAttribute(int *out, int what, void *f) { return *out = what == 0 ? 1024 : 0, 0; }
"""
EMPTY = (
    "cuCtxGetLimit cuCtxSetCurrent cuCtxSetLimit cuDeviceGet cuDevicePrimaryCtxRetain cuDriverGetVersion "
    "cuFuncSetAttribute cuFuncSetCacheConfig cuGetErrorString cuModuleGetFunction cuModuleLoadData "
    "cuOccupancyMaxActiveClusters cuTensorMapEncodeTiled cuTensorMapEncodeIm2col"
)


@contextmanager
def launching_nothing() -> Iterator[ctypes.CDLL]:
    """Make Triton's CUDA driver take CPU tensors as if they were on an H100; yield the stub libcuda.

    Its function `launched()` returns the number of launches so far."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "cuda.c"), Path(folder, "libcuda.so.1")
        source.write_text(FUNCTIONS + "".join(f"int {name}(void) {{ return 0; }}\n" for name in EMPTY.split()))
        compiler = os.environ.get("CC", "cc")
        flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        # Triton links with the library under this name, too.
        Path(folder, "libcuda.so").symlink_to(library)
        cuda = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        cuda.launched.restype = ctypes.c_long
        with patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder):
            from triton.backends.nvidia.driver import CudaDriver

            driver = CudaDriver()
        driver.get_device_capability = lambda _: (9, 0)
        driver.get_current_device = lambda: 0
        driver.get_current_stream = lambda _: 0
        triton.runtime.driver.set_active(driver)
        from genarm_fast.kernels import _dispatch, _native

        on_gpu = patch.multiple(_dispatch, GPUS=("cpu",), on_cpu=lambda _: False)
        with on_gpu, patch.object(_native, "core", None):
            yield cuda


def cases() -> dict[str, Callable[[], Any]]:
    from genarm_fast.kernels import guided_sample

    rows, vocab = 8, 32000
    base, arm = torch.zeros(rows, vocab, dtype=torch.bfloat16), torch.zeros(rows, vocab, dtype=torch.bfloat16)
    weights, index = torch.ones(rows, 1), torch.arange(rows)
    plain = {"seeds": index, "positions": index, "temperature": torch.ones(rows)}
    filters = {"top_k": torch.full((rows,), 50), "top_p": torch.full((rows,), 0.9), "min_p": torch.zeros(rows)}
    return {
        "tensors": lambda: guided_sample(base, (arm,), weights, **plain),
        "log-probs": lambda: guided_sample(base, (arm,), weights, **plain, return_logprobs=True),
        "filters": lambda: guided_sample(base, (arm,), weights, **plain, **filters),
        "numbers": lambda: guided_sample(base, (arm,), [0.5], seeds=7, positions=3, temperature=0.8),
        "as in a loop": lambda: guided_sample(base, arm, 0.5, temperature=0.8),
    }


def measure(call: Callable[[], Any], launched: Callable[[], int], calls: int, rounds: int) -> dict[str, float]:
    """Return the CPU time of a call in microseconds, the median of rounds, and Triton's launches per call."""
    for _ in range(20):
        call()
    before = launched()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            call()
        times.append(1e6 * (time.process_time() - start) / calls)
    return {"host_us": statistics.median(times), "launches": (launched() - before) / calls / rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with launching_nothing() as cuda, torch.inference_mode():
        found = {
            name: measure(call, cuda.launched, arguments.calls, arguments.rounds) for name, call in cases().items()
        }
    about = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    about["triton"] = triton.__version__
    if arguments.json:
        print(json.dumps({"about": about, "calls": found}, indent=1))
        return
    print("| call | host, µs | launches |\n|---|---|---|")
    for name, line in found.items():
        print(f"| {name} | {line['host_us']:.1f} | {line['launches']:.0f} |")


if __name__ == "__main__":
    main()
