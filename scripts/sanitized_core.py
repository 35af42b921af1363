"""Builds the C++ core with AddressSanitizer and UndefinedBehaviorSanitizer, and loads it in place of the usual one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).parents[1] / "kernels/csrc"
SANITIZERS = "-fsanitize=address,undefined"
FLAGS = ["-std=c++17", "-O0", "-g1", "-fPIC", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", SANITIZERS]
FLAGS += ["-ffp-contract=off", "-DGENARM_X86", f"-I{CSRC}", f"-I{sysconfig.get_path('include')}"]
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
LOOPS = {"baseline": [], "avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": [*AVX512, "-mfma", "-mf16c"]}


def missing() -> str | None:
    """Return why no sanitized core can be built here, or None if it can."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "x86-64 Linux build flags"
    return None if shutil.which("g++") and os.path.isabs(_runtime()) else "no g++ with AddressSanitizer"


def build(folder: Path) -> Path:
    """Compile the core into a folder, with one process per CPU core, and return the extension's path.

    This takes 60 s on two cores."""
    names = {file: "-".join(file.relative_to(CSRC).with_suffix("").parts) for file in CSRC.rglob("*.cpp")}
    loops = [file for file in names if file.stem == "loops"]
    jobs = {f"{names[file]}-{isa}": [file, f"-DISA={isa}", *flags] for file in loops for isa, flags in LOOPS.items()}
    for isa, op in (("avx512vnni", "quant_linear"), ("avx512bf16", "small_linear")):
        jobs[f"{op}-{isa}"] = [CSRC / op / "loops.cpp", f"-DISA={isa}", *LOOPS["avx512"], f"-m{isa}"]
    jobs |= {name: [file] for file, name in names.items() if file not in loops}

    def compile(name: str) -> None:
        subprocess.run(["g++", *FLAGS, *map(str, jobs[name]), "-c", "-o", folder / f"{name}.o"], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile, jobs))
    core = folder / "_C.abi3.so"
    objects = [folder / f"{name}.o" for name in jobs]
    subprocess.run(["g++", "-shared", SANITIZERS, *objects, "-o", core, "-pthread"], check=True)
    return core


def environment() -> dict[str, str]:
    """Return the environment of a Python process that loads a sanitized core. Leaks are not reported."""
    # Without libstdc++ in LD_PRELOAD, an exception that PyTorch throws and catches would end the process.
    preload = f"{_runtime()} {_runtime('stdc++')}"
    return os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}


def load(core: str) -> None:
    """Load a core from a file and use it instead of the installed one."""
    import importlib.machinery
    import importlib.util

    import torch

    from genarm_fast.kernels import _native

    loader = importlib.machinery.ExtensionFileLoader("_C", core)
    _native.core = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
    _native.core.use_tensors(torch.Tensor)
    _native.core.use_threads(torch.get_num_threads)


def _runtime(name: str = "asan") -> str:
    found = subprocess.run(["gcc", f"-print-file-name=lib{name}.so"], capture_output=True, text=True)
    return found.stdout.strip()
