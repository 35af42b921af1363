"""The ends of engine processes after a test that failed, hung or was killed. No engine is started here."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
from processes import end, show_stacks, started

SLEEPS = (
    "import time\ndef engine_that_hangs():\n    print('ready', flush=True)\n    time.sleep(100)\nengine_that_hangs()"
)
PARENT = f"""
import os, subprocess, sys
os.environ["GENARM_TESTS_PID"] = str(os.getpid())
print(subprocess.Popen([sys.executable, "-c", {SLEEPS!r}], stdout=subprocess.DEVNULL).pid, flush=True)
sys.stdin.read()
"""


def test_a_process_that_hangs_shows_where_and_is_ended(capfd):
    before = {process.pid for process in started()}
    with subprocess.Popen([sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE) as hanging:
        assert hanging.stdout.readline() == b"ready\n"
        mine = [process for process in started() if process.pid not in before]
        assert [process.pid for process in mine] == [hanging.pid]
        show_stacks(mine)
        assert "in engine_that_hangs" in capfd.readouterr().err
        assert hanging.poll() is None
        end(mine)
    assert [process for process in started() if process.pid not in before] == []


def test_processes_end_with_the_tests_that_started_them():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)
    ) as tests:
        engine = psutil.Process(int(tests.stdout.readline()))
        assert engine.is_running()
        tests.kill()
        psutil.wait_procs([engine], timeout=20)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
