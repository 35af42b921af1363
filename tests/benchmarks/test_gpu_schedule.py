"""Tests of the GPU benchmark when rows fail, die or hang, when the budget runs out, and when the run is killed."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOOD = ["good", "after an error", "after a spoilt one", "after a death", "another group", "last", "fits"]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return lambda name: importlib.import_module(f"gpu_bench.{name}")


def started(folder, *options):
    command = [sys.executable, "benchmarks/gpu.py", "--dry", "--rows", "gpu_stub_rows", "--out", str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def living(group):
    """Count the running processes of a process group, and its first process. Zombies do not count."""
    stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    of_group = [state for state, _, in_group, *_ in stats if int(in_group) == group and state != "Z"]
    own = Path(f"/proc/{group}/stat")
    return len(of_group) + (own.exists() and own.read_text().rpartition(")")[2].split()[0] != "Z")


def result_in(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_what_fails_costs_no_other_row(part, tmp_path, monkeypatch):
    """The whole script runs all stub rows, except for the two that would take long: "hangs" and "for ever"."""
    names = [row.name for row in importlib.import_module("gpu_stub_rows").ROWS if row.name not in ("hangs", "for ever")]
    run = started(tmp_path, "--only", *names)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 1, said
    result = result_in(tmp_path)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == names
    assert {rows[name]["ms"] for name in GOOD} == {1.0}
    assert rows["raises"]["error"] == "ZeroDivisionError: by nought"
    assert "in raises" in rows["raises"]["traceback"]
    assert rows["lacks"]["skipped"] == "no such model"
    assert rows["dies"]["error"] == f"its process ended with {-signal.SIGSEGV}"
    assert "in dies" in rows["dies"]["traceback"]
    assert rows["long"]["skipped"] == "not done after 4 s"  # 8 times the row's limit, because a trial is slower
    assert "in long" in rows["long"]["traceback"]
    assert [rows[name]["so_far"]["lines"] for name in ("raises", "dies")] == [[1.5], [2.5]]
    assert result["no_time_for"] == ["does not fit"]
    assert "running" not in result
    processes = [rows[name]["process"] for name in GOOD]
    # A new process starts if the GPU is spoilt (also while the second group is left), a process dies or time is up.
    assert [a == b for a, b in pairwise(processes)] == [True, False, False, False, False, True]
    table = next(tmp_path.glob("*.md")).read_text()
    for words in ("- raises: ZeroDivisionError: by nought", "- dies: its process", "- does not fit: no time: it takes"):
        assert words in table


def test_a_process_that_hangs_is_ended(part, monkeypatch):
    """A call that blocks keeps Python from running signal handlers, so the process has to be killed."""
    workers = part("workers")
    monkeypatch.setattr(workers, "GRACE", 0.5)
    rows = {row.name: row for row in importlib.import_module("gpu_stub_rows").ROWS}
    kept = []
    with workers.Workers("gpu_stub_rows", "dry") as pair:
        hung = pair.run(rows["hangs"], 0.5, kept.append)
        assert pair.run(rows["good"], 5, kept.append)["ms"] == 1
    assert hung["error"] == "its process hung for 0 s"
    assert "in hangs" in hung["traceback"]
    assert kept == [hung["so_far"]] == [{"lines": [3.5]}]


def test_a_gpu_that_fails_between_groups_fails_no_row(part):
    workers = part("workers")
    rows = {row.name: row for row in importlib.import_module("gpu_stub_rows").ROWS}
    with workers.Workers("gpu_stub_rows", "dry") as pair:
        found = [pair.run(rows[name], 5, print) for name in ("leaves badly", "another group", "another group")]
    assert [entry.get("ms") for entry in found] == [2.0, 1.0, 1.0]
    assert found[1]["process"] == found[2]["process"]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_leaves_what_was_measured(tmp_path, kill):
    run = started(tmp_path, "--only", "good", "for ever", "fits")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if any("so_far" in json.loads(path.read_text()).get("running", ()) for path in tmp_path.glob("*.json")):
            break
        time.sleep(0.05)
    run.send_signal(kill)
    said, _ = run.communicate(timeout=60)
    result = result_in(tmp_path)
    assert [(row["name"], row["ms"]) for row in result["rows"]] == [("good", 1.0), ("fits", 1.0)]
    until = time.monotonic() + 20
    while (left := living(result["rows"][0]["process"])) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left  # no process stays on the GPU
    assert result["running"] == {"name": "for ever", "so_far": {"lines": [4.5]}}
    assert not list(tmp_path.glob("*.partial"))
    if kill == signal.SIGTERM:
        assert run.returncode == 1
        assert "- for ever: the run ended in it" in said
    else:
        assert run.returncode == -kill


class Steps:
    """A runner whose rows take the given seconds of a clock that only these rows advance."""

    def __init__(self, path, **seconds):
        self.path, self.seconds, self.now, self.seen, self.limits = path, seconds, 0.0, [], {}

    def run(self, row, seconds, keep):
        self.seen.append(json.loads(self.path.read_text()))
        self.limits[row.name] = seconds
        self.now += self.seconds[row.name]
        return {"ms": self.seconds[row.name]}


def test_a_budget_that_runs_out(part, tmp_path):
    """Rows that no longer fit are skipped and named; shorter ones after them run."""
    schedule, path = part("schedule"), tmp_path / "result.json"
    rows = [schedule.Row(name, print, seconds) for name, seconds in [("a", 20), ("b", 60), ("c", 30), ("d", 5)]]
    runner, result = Steps(path, a=30, b=45, d=5), {}
    schedule.run_all(rows, runner, result, path, 100.0, say=lambda line: None, clock=lambda: runner.now)
    assert json.loads(path.read_text()) == result
    a, b, c, d = result["rows"]
    assert (a["ms"], b["ms"], d["ms"]) == (30, 45, 5)
    assert c["skipped"] == "no time: it takes about 30 s, and 25 s are left"
    assert result["no_time_for"] == ["c"]
    assert [[row["name"] for row in seen["rows"]] for seen in runner.seen] == [[], ["a"], ["a", "b", "c"]]
    assert [seen["running"]["name"] for seen in runner.seen] == ["a", "b", "d"]
    assert runner.limits == {"a": 60, "b": 70, "d": 25}  # never more than is left


def test_time_that_is_swallowed_is_up_again(part, monkeypatch):
    """Python swallows an exception that is raised in an object's `__del__`, so the alarm rings again."""
    schedule = part("schedule")
    monkeypatch.setattr(schedule, "AGAIN", 0.05)
    with schedule.at_most(0.05):
        for _ in range(3):
            with pytest.raises(schedule.TimeIsUp):
                time.sleep(5)


def test_numbers_that_are_none_are_found(part):
    nan = {"rows": [{"ms": 1.0}, {"ms": float("nan"), "deep": {"x": float("inf"), "text": "nan"}}]}
    assert part("schedule").not_finite(nan) == ["/rows/1/ms", "/rows/1/deep/x"]


def test_the_estimates_fit_the_budget(part):
    """All rows but the last, nsys, fit 480 s with the imports and a tenth to spare. nsys may be left out."""
    rows, imports = part("rows").ROWS, 25
    assert imports + sum(row.seconds for row in rows[:-1]) + part("schedule").RESERVE <= 480 * 0.9
    settings = part("settings")
    assert settings.REAL.test_seconds < rows[0].seconds < rows[0].limit


def test_every_row_that_compiles_is_prepared(part):
    prepared = {name for job in part("settings").JOBS for name in job.rows}
    # The job of "first token" compiles the kernels of "base". "training" has few kernels, and takes memory that the
    # tests need.
    others = {"gpu tests", "W", "base", "Hugging Face, eager", "training", "profile, nsys"}
    assert {row.name for row in part("rows").ROWS} - others == prepared
    assert len({job.name for job in part("settings").JOBS}) == len(part("settings").JOBS)
    assert part("settings").REAL.shallow({}).shapes["8b"]["num_hidden_layers"] == 1


def test_processes_that_run_together(part, tmp_path):
    """One process ends, one fails, one is killed when time is up, and one never starts. No process is left."""
    prepare = part("prepare")
    shell = {"ends": "echo $WORD", "fails": "echo no; exit 3", "stays": "echo $$; sleep 60 & sleep 60", "waits": "true"}
    commands = {name: prepare.Command(["sh", "-c", line], {"WORD": "x"}) for name, line in shell.items()}
    found = prepare.run_together(commands, tmp_path, 1, 5)
    assert set(found["ends"]) == {"seconds"}
    assert (found["fails"]["exit"], found["fails"]["output"]) == (3, "no\n")
    assert found["stays"]["unfinished"] == 1
    assert found["waits"] == {"unfinished": 1}
    assert not living(int(found["stays"]["output"]))


def test_progress_of_tests_that_had_no_time(part, tmp_path):
    prepare = part("prepare")
    output = "..s.F..                  [ 12%]\n..E\nFAILED tests/x.py::test_s - assert\n"
    expected = {"finished": 0, "passed": 7, "failed": 2, "skipped_tests": 1}
    assert prepare.unfinished(output) == expected
    assert prepare.counted(tmp_path / "none.xml", {"unfinished": 1, "output": output}) == expected | {"output": output}
    broken = prepare.counted(tmp_path / "none.xml", {"exit": -11, "output": output})
    # The test in which pytest died wrote nothing, and counts as failed.
    assert broken == expected | {"failed": 3, "output": output}


def test_shards_are_all_tests(part, tmp_path):
    """Each test marked gpu runs in one shard; tests without the mark are removed before the split."""
    prepare = part("prepare")
    lines = ["import pytest", *(f"def test_{i}(): pass" for i in range(2))]
    lines += ["@pytest.mark.gpu", "@pytest.mark.parametrize('i', range(7))", "def test_gpu(i): assert i != 4"]
    file = tmp_path / "test_some.py"
    file.write_text("\n".join(lines))
    commands = {str(i): prepare.testing(tmp_path, i, 3, [str(file)]) for i in range(3)}
    done = prepare.run_together(commands, tmp_path, 3, 60)
    counts = [prepare.counted(tmp_path / f"{i}.xml", done[str(i)]) for i in range(3)]
    assert [(count["passed"], count["failed"], count["finished"]) for count in counts] == [
        (3, 0, 1),
        (1, 1, 1),
        (2, 0, 1),
    ]


def test_a_clone_that_is_not_installed_runs(part, tmp_path):
    """Without an installed genarm_fast, as on a machine without network, the benchmark's processes still import it."""
    script, test = tmp_path / "script.py", tmp_path / "test_import.py"
    lines = ["import sys; sys.meta_path[:] = [each for each in sys.meta_path if 'Editable' not in str(each)]"]
    test.write_text("\n".join([*lines, "import genarm_fast.kernels", "def test_gpu(): pass"]))
    lines += [f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r})", "from gpu_bench.clone import importable"]
    lines += ["importable()", "import genarm_fast.kernels as kernels, os, subprocess; print(kernels.__file__)"]
    lines += ["from gpu_bench.prepare import testing, Path; os.chdir(sys.argv[1])"]
    lines += ["command = testing(Path(sys.argv[2]), 0, 1, [sys.argv[2] + '/test_import.py', '-m', ''])"]
    lines += ["subprocess.run(command.words, env=os.environ | command.environment, check=True)"]
    script.write_text("\n".join(lines))
    command = [sys.executable, str(script), str(ROOT), str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    kernels, tests = run.stdout.split("\n", maxsplit=1)
    assert "genarm-fast-" in kernels
    assert "1 passed" in tests
    assert not Path(kernels).exists()  # the process removed its folder of links


def test_torch_for_cuda_is_told_from_its_version(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    has = importlib.import_module("has_cuda_torch")
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "__init__.py").touch()
    for line, found in [("cuda: Optional[str] = '13.0'", True), ("cuda: Optional[str] = None", False), ("", False)]:
        (torch / "version.py").write_text(f"from typing import Optional\nhip: Optional[str] = '7'\n{line}\n")
        spec = importlib.util.spec_from_file_location("torch", torch / "__init__.py")
        monkeypatch.setattr(has, "find_spec", lambda name, spec=spec: spec)
        assert has.built_for_cuda() is found
    monkeypatch.setattr(has, "find_spec", lambda name: None)
    assert not has.built_for_cuda()
