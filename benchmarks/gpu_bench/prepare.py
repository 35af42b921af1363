"""The first row: many processes run the tests marked gpu, and compile the kernels of all other rows.

Triton compiles in the process that launches, one kernel after another, for about a second each. Triton's cache on disk
keeps the compiled kernels, so the later rows find them there.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
BENCHMARKS = Path(__file__).parents[1]
TAIL = 3000  # last characters that are kept of a failed process's output
PR_SET_PDEATHSIG = 1  # an option of Linux's prctl
COUNTS = ("passed", "failed", "skipped_tests")


class Command(NamedTuple):
    """A command to run. environment: variables that the process gets beside those of this process."""

    words: Sequence[str]
    environment: Mapping[str, str]


class Process(NamedTuple):
    """A running process, the file that it prints to, and the time of its start."""

    name: str
    popen: subprocess.Popen[bytes]
    output: Path
    began: float

    def told(self, **more: Any) -> dict[str, Any]:
        """Return its seconds and, if it failed, its exit code and the end of its output."""
        found = {"seconds": round(time.monotonic() - self.began, 1), **more}
        if self.popen.returncode:
            found |= {"exit": self.popen.returncode, "output": self.output.read_text(errors="replace")[-TAIL:]}
        return found


def die_with_parent() -> None:
    """Have this process killed when its parent ends, so that no process stays on the GPU. Only Linux can do this."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_together(commands: Mapping[str, Command], folder: Path, most: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Run commands in this order, at most `most` at a time, and kill those that have not ended after `seconds`.

    Returns, by name, the `seconds` of each command. A failed command also has its `exit` code and the end of its
    `output`; a command that was killed or never started has `unfinished`.
    """
    end, waiting, running = time.monotonic() + seconds, list(commands.items()), list[Process]()
    found: dict[str, dict[str, Any]] = {}
    try:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < most:
                name, (words, environment) = waiting.pop(0)
                output = folder / f"{len(commands) - len(waiting)}.txt"
                with output.open("wb") as file:
                    popen = subprocess.Popen(
                        words, cwd=ROOT, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=file,
                        stderr=file, start_new_session=True, preexec_fn=die_with_parent,
                    )  # fmt: skip
                running.append(Process(name, popen, output, time.monotonic()))
            time.sleep(0.05)
            for process in [each for each in running if each.popen.poll() is not None]:
                running.remove(process)
                found[process.name] = process.told()
    finally:
        for process in running:
            os.killpg(process.popen.pid, signal.SIGKILL)  # ends the compilers that it started as well
        for process in running:
            process.popen.wait()
            found[process.name] = process.told(unfinished=1)
    return found | {name: {"unfinished": 1} for name, _ in waiting}


def gpu_tests(bench: Any) -> dict[str, Any]:
    """Return how many tests marked gpu passed, failed and were skipped, and how many jobs were compiled meanwhile.

    The tests are split into shards, one process each, since a single process would compile their kernels for minutes.
    """
    setting, cores = bench.setting, os.cpu_count() or 1
    shards = max(1, min(setting.shards, cores // 2))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests = {f"tests {shard}": testing(folder, shard, shards, setting.tests) for shard in range(shards)}
        compiling = {job.name: Command(compiler(job.name, setting.name), {}) for job in setting.jobs}
        most = cores + cores // 4  # processes sometimes wait for the disk or the GPU
        done = run_together(tests | compiling, folder, max(most, 2), setting.test_seconds)
        counts = [counted(folder / f"{shard}.xml", done.pop(f"tests {shard}")) for shard in range(shards)]
    found: dict[str, Any] = {name: sum(count[name] for count in counts) for name in ("finished", *COUNTS)}
    found["finished"] = int(found["finished"] == shards)
    found["compiled"] = sum(not {"exit", "unfinished"} & each.keys() for each in done.values())
    failed = [count["output"] for count in counts if count["failed"]]
    return found | {"shards": shards, "compilations": done} | ({"output": failed} if failed else {})


def testing(folder: Path, shard: int, shards: int, tests: Sequence[str]) -> Command:
    """Return the command that runs one shard of the tests: every `shards`-th test, from number `shard` on."""
    words = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-m", "gpu", "-p", "no:cacheprovider"]
    words += ["-p", "gpu_bench.shard", "--shard", f"{shard}/{shards}", f"--junitxml={folder / f'{shard}.xml'}", *tests]
    path = os.pathsep.join(filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH")]))
    # `-m` would put the clone's root first on the path, where `genarm_fast` has no kernels.
    return Command(words, {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "TRITON_INTERPRET": "0"})


def compiler(job: str, setting: str) -> list[str]:
    """Return the command that compiles the kernels of a job, by running its rows with shallow models."""
    return [sys.executable, str(BENCHMARKS / "gpu.py"), "--compile", job, *(["--dry"] if setting == "dry" else [])]


def counted(report: Path, done: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counts of a shard: from pytest's report, or from its output if it was killed or crashed."""
    output = done.get("output", "")
    if not report.exists():
        return unfinished(output, broken="unfinished" not in done) | {"output": output}
    suite = ElementTree.parse(report).getroot()[0]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed, skipped = counts["failures"] + counts["errors"], counts["skipped"]
    passed = counts["tests"] - failed - skipped
    return {"finished": 1, "passed": passed, "failed": failed, "skipped_tests": skipped, "output": output}


def unfinished(output: str, broken: bool = False) -> dict[str, Any]:
    """Count the dots and letters that pytest printed. broken: pytest itself crashed, which counts as a failed test."""
    progress = "".join(re.findall(r"^([.sFEx]+)(?: +\[ *\d+%\])?$", output, re.MULTILINE))
    failed = progress.count("F") + progress.count("E") + broken
    return {"finished": 0, "passed": progress.count("."), "failed": failed, "skipped_tests": progress.count("s")}
