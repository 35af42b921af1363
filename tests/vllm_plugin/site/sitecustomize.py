"""Lets vLLM's V2 model runner start without a GPU: its Triton kernels run in Triton's interpreter.

Python imports this by itself in each process that has the folder in PYTHONPATH, before vLLM and Triton. Upstream has no
such way yet: vllm#55847 has PyTorch fallbacks, and triton-cpu is not on PyPI.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")

import triton.backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class NoDriver(DriverBase):
    """Stands among Triton's backends so that one is found; the interpreter never asks it to compile."""

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
