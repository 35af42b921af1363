"""The process's answer to signals, full disks, closed and narrow streams: a sentence, an exit code, nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_models import build_model, build_tokenizer

from genarm_fast.jobs.results import ResultsFile

ERRORS = "genarm-fast generate: "


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    build_model("llama", 0).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def command(base, *options, **environment):
    arguments = [sys.executable, "-m", "genarm_fast", "generate", "--base", str(base), "--raw", "--max-new-tokens", "3"]
    return [*arguments, *map(str, options)], os.environ | {"HF_HUB_OFFLINE": "1"} | environment


def run(base, *options, redirect="", **environment):
    arguments, env = command(base, *options, **environment)
    line = " ".join(map("'{}'".format, arguments)) + redirect
    return subprocess.run(["sh", "-c", line], env=env, capture_output=True, text=True, errors="replace")


@pytest.mark.parametrize(
    ("redirect", "environment", "code", "said"),
    [
        ("the <&-", {}, 0, ""),
        ("<&-", {}, 2, "prompts.*expected|expected a"),
        ("the >&-", {}, 0, ""),
        ("the >/dev/full", {}, 1, "No space left on device"),
        ("the 2>&-", {}, 0, ""),
        ("the", {"PYTHONIOENCODING": "ascii", "PYTHONOPTIMIZE": "1"}, 0, ""),
        ("the", {"PYTHONOPTIMIZE": "2"}, 1, "PYTHONOPTIMIZE=2: expected at most 1"),
    ],
)
def test_streams(base, redirect, environment, code, said):
    done = run(base, "--seed", "1", redirect=f" {redirect}", **environment)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    lines = done.stderr.splitlines()
    if said:
        assert len(lines) == 1
        assert lines[0].startswith(ERRORS)
        if "No space" in said:
            assert said in lines[0]
    else:
        assert lines == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_job_that_resumes(base, tmp_path, number):
    lines = "".join(f'{{"prompt": "p{i}", "max_new_tokens": 100}}\n' for i in range(400))
    (tmp_path / "in.jsonl").write_text(lines)
    out = tmp_path / "out.jsonl"
    arguments, env = command(base, "--input", tmp_path / "in.jsonl", "--output", out, "--max-batch-size", 4)
    before = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP, and the command inherits that
    with subprocess.Popen(arguments, env=env, stderr=subprocess.PIPE, text=True) as process:
        signal.signal(number, before)
        while not out.exists() or out.stat().st_size == 0:
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "the same command resumes" in told
    assert f"{ERRORS}ended by {number.name}" in told
    assert "Traceback" not in told
    assert out.read_bytes().endswith(b"\n")


def test_a_full_disk_names_the_file_and_the_way_out(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    path = tmp_path / "out.jsonl"
    with ResultsFile(path, [], "setup") as results:
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"No space left on device; the same command resumes: '.*out\.jsonl'"):
            results.append([{"id": 1, "text": "a"}])
        monkeypatch.undo()
    with ResultsFile(path, [], "setup", overwrite=True) as results:
        results.append([{"id": 1, "text": "a"}])
    assert path.read_text() == '{"id": 1, "text": "a"}\n'


def test_a_stream_left_open_at_exit_says_nothing(base):
    code = (
        "import sys; from genarm_fast import GenARM\n"
        "stream = GenARM.from_pretrained(sys.argv[1]).stream(['the', 'a'], max_new_tokens=50)\nnext(stream)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(base)], env=env, capture_output=True, text=True)
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if "Loading weights" not in line] == []
