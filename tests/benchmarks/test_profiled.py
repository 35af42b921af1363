"""benchmarks/profiled.py: its figures from a profiler's events."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


def event(name, start, end, ours=True):
    elapsed = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, is_user_annotation=ours, time_range=elapsed)


@pytest.fixture
def events():
    """Two steps of 100 and 60 us, unordered; work outside of steps and operators does not count."""
    return [
        event("aten::mm", 20, 30, ours=False),
        event("ProfilerStep#1", 0, 500),
        event("outside", 5, 9),
        event("step", 10, 110),
        event("base.forward", 20, 80),
        event("decode", 15, 105),
        event("sample", 80, 90),
        event("step", 200, 260),
        event("decode", 200, 250),
    ]


def test_ranges(script, events):
    found = script("profiled").ranges(events)
    assert [(each.name, each.depth, each.start, each.end, each.own) for each in found] == [
        ("step", 0, 5, 105, 10),
        ("decode", 1, 10, 100, 20),
        ("base.forward", 2, 15, 75, 60),
        ("sample", 2, 75, 85, 10),
        ("step", 0, 195, 255, 10),
        ("decode", 1, 195, 245, 50),
    ]


def test_summary(script, events):
    profiled = script("profiled")
    lines = {line["range"]: line for line in profiled.summary(profiled.ranges(events))}
    assert sum(line["share"] for line in lines.values()) == pytest.approx(1)
    expected = {"range": "decode", "a step": 1.0, "ms": 0.07, "own ms": 0.035, "share": 70 / 160}
    assert lines["decode"] == pytest.approx(expected)
    assert lines["sample"]["a step"] == 0.5


def test_one_step_is_drawn(script, events, tmp_path):
    profiled = script("profiled")
    step = profiled.middle_step(profiled.ranges(events))
    assert [each.name for each in step] == ["step", "decode", "base.forward", "sample"]
    profiled.draw(step, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 5_000


def test_a_whole_run(tmp_path, tiny_model, tokenizer, script):
    """The run is called as a user calls it; the library's range names are in the trace, the table and the file."""
    for name, seed in (("base", 0), ("arm", 1)):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in ("base", "arm")]
    command = [sys.executable, script("profiled").__file__, *folders, "--k", "2", "--tokens", "6"]
    done = subprocess.run([*command, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = json.loads((tmp_path / "out" / "ranges.json").read_text())["ranges"]
    names = {line["range"] for line in lines}
    assert names >= {"step", "admit", "prefill", "decode", "draft", "base.forward", "sample", "accept", "read-back"}
    assert sum(line["share"] for line in lines) == pytest.approx(1)
    assert "base.forward" in (tmp_path / "out" / "trace.json").read_text()
    assert "base.forward" in done.stdout


@pytest.mark.parametrize("cuda", [False, True])
def test_profile_sh(tmp_path, script, cuda):
    """With stand-ins for nsys and python, Nsight runs if both are there, else torch.profiler."""
    log = tmp_path / "log"
    for name, status in (("nsys", 0), ("python", 0 if cuda else 1)):
        stand_in = tmp_path / name
        stand_in.write_text(
            f'#!/bin/sh\necho {name} "$GENARM_FAST_NVTX" "$@" >> {log}\n[ "$1" != -c ] || exit {status}\n'
        )
        stand_in.chmod(0o755)
    command = Path(script("profiled").__file__).with_name("profile.sh")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
    subprocess.run([command, "--k", "3"], env=environment, check=True)
    _, *lines = log.read_text().splitlines()
    if not cuda:
        assert lines == ["python  benchmarks/profiled.py --k 3"]
        return
    recorded, shown = lines
    assert recorded.startswith("nsys 1 profile --trace=cuda,nvtx")
    assert recorded.endswith(f"--output=profile/guided {tmp_path / 'python'} benchmarks/profiled.py --nsight --k 3")
    assert shown == "nsys 1 stats --report nvtx_sum,nvtx_gpu_proj_sum,cuda_gpu_kern_sum profile/guided.nsys-rep"
