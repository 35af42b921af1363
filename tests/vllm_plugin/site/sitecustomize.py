"""Lets vLLM's V2 model runner start without a GPU: its Triton kernels run in Triton's interpreter.

Python imports this module in each process that has the folder in PYTHONPATH, before vLLM and Triton. Upstream has no
such way yet: vllm#55847 has PyTorch fallbacks, and triton-cpu is not on PyPI.

Each process also ends when the process in GENARM_TESTS_PID ends, however that happens, and writes its stacks on
SIGUSR1.
"""

import faulthandler
import os
import select
import signal
import threading

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")

import triton.backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class NoDriver(DriverBase):
    """A driver that Triton finds among its backends; the interpreter never asks it to compile."""

    __abstractmethods__ = frozenset()

    def __init__(self):
        pass

    @classmethod
    def is_active(cls):
        return False

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=NoDriver)


def end_with(pid: int) -> None:
    try:
        ended = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)
    select.select([ended], [], [])
    os._exit(1)


tests = int(os.environ.get("GENARM_TESTS_PID", "0"))
if tests and tests != os.getpid():
    watch = {"target": end_with, "args": (tests,), "daemon": True}
    threading.Thread(**watch).start()
    # A fork loses the thread, so the child starts a new one.
    os.register_at_fork(after_in_child=lambda: threading.Thread(**watch).start())
faulthandler.register(signal.SIGUSR1)
