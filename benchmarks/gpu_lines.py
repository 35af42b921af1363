"""Lists lines that serve only a GPU and that none of the given tests runs without a GPU.

    python benchmarks/gpu_lines.py [TEST ...] [--folder FOLDER]

It covers the CUDA device, the launchers of Triton kernels, the stacked decoder, flash-attn, and other functions that
ask whether a tensor is on CUDA. Kernels are left out, since the interpreter has tests of its own. pytest runs the tests
under a tracer, and so do the pytest processes that tests start. All tests together take long. So they can be given in
pieces with one --folder, where traces stay: lines that an earlier piece ran count, unless someone edits the files.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = "GPU_LINES_FOLDER"
WHOLE = ("genarm_fast/device/cuda.py", "genarm_fast/models/stacked_decoder.py", "genarm_fast/models/flash_attention.py")
LAUNCHERS = ("triton.py", "triton_append.py", "triton_filters.py", "_triton.py")
ASKS = ("is_cuda", "GPUS", '"cuda"', "torch.cuda")
TESTS = (
    "tests/device/test_cuda.py",
    "tests/device/test_cuda_alone.py",
    "tests/device/test_fake_cuda.py",
    "tests/models/test_flash_attention.py",
    "tests/models/test_stacked_decoder.py",
)


def lines_of(path: Path) -> dict[str, set[int]]:
    """Return the lines with code of each function that serves a GPU, by the function's name.

    Kernels are left out. In files outside WHOLE and LAUNCHERS, only functions count that use a word of ASKS."""
    source = path.read_text()
    whole = path.relative_to(ROOT).as_posix() in WHOLE or path.name in LAUNCHERS
    found = {}
    for name, code, node in functions(ast.parse(source), compile(source, str(path), "exec")):
        text = ast.get_source_segment(source, node) or ""
        kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        if not kernel and (whole or any(word in text for word in ASKS)):
            found[name] = {line for *_, line in code.co_lines() if line} - {code.co_firstlineno}
    return found


def functions(tree: ast.Module, module: CodeType) -> Iterator[tuple[str, CodeType, Any]]:
    """Yield (name, code object, syntax node) of every function of a module."""
    nodes = {
        (min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.name): node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    codes = [module]
    while codes:
        code = codes.pop()
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
        if (code.co_firstlineno, code.co_name) in nodes:
            yield (
                code.co_qualname if hasattr(code, "co_qualname") else code.co_name,
                code,
                nodes[code.co_firstlineno, code.co_name],
            )


def files() -> list[Path]:
    return [
        path for top in ("genarm_fast", "kernels/ops") for path in sorted((ROOT / top).rglob("*.py")) if lines_of(path)
    ]


def trace(folder: str) -> None:
    """Record from now on which lines of `files()` run, and write them into `folder` when the process ends."""
    wanted = {str(path.resolve()): set() for path in files()}
    known: dict[str, Any] = {}  # file name in a code object -> the set of its lines that ran, or None for other files

    def local(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            known[frame.f_code.co_filename].add(frame.f_lineno)
        return local

    def called(frame: Any, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in known:
            known[name] = wanted.get(str(Path(name).resolve()))
        return None if known[name] is None else local

    def dump() -> None:
        sys.settrace(None)
        ran = {str(Path(path).relative_to(ROOT)): sorted(lines) for path, lines in wanted.items()}
        Path(folder, f"{time.time_ns()}-{os.getpid()}.json").write_text(json.dumps(ran))

    atexit.register(dump)
    threading.settrace(called)
    sys.settrace(called)


def never_run(folder: Path) -> dict[str, dict[str, list[int]]]:
    """Return the lines that no process ran, by file and function. folder: has the traces of the processes."""
    ran: dict[str, set[int]] = {}
    for path in folder.glob("*.json"):
        for name, lines in json.loads(path.read_text()).items():
            ran.setdefault(name, set()).update(lines)
    found: dict[str, dict[str, list[int]]] = {}
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        for function, lines in lines_of(path).items():
            if missing := sorted(lines - ran.get(name, set())):
                found.setdefault(name, {})[function] = missing
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=TESTS, help="default: those of devices, kernels and decoders")
    parser.add_argument("--folder", type=Path, help="where traces stay, those of earlier tests too; default: nowhere")
    args = parser.parse_args()
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() if args.folder is None else nullcontext(str(args.folder.resolve())) as folder:
        paths = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, FOLDER: folder, "PYTHONPATH": paths, "PYTEST_ADDOPTS": "-p gpu_lines"}
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *args.tests]
        done = subprocess.run(command, cwd=ROOT, env=environment)
        found = never_run(Path(folder))
    for name, by_function in found.items():
        source = (ROOT / name).read_text().splitlines()
        for function, lines in by_function.items():
            print(f"{name} {function}")
            print(*(f"  {line:4} {source[line - 1].strip()}" for line in lines), sep="\n")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
elif FOLDER in os.environ:  # pytest imports this module as a plugin
    trace(os.environ[FOLDER])
